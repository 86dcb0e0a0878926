"""What passes between the stages of a step: one frozen dataclass per stage.

Axes: ``B`` sequences, ``S`` tokens of prompt + response (right-padded), ``T`` response
tokens (right-padded, aligned so that column 0 is the first response token),
``H`` critic heads, ``M`` quantiles. Every ``[B, T]`` field is defined where
``response_mask`` is True and is 0 elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One row of the data. ``index`` is its position in the dataset: the ledger counts it."""

    index: int
    messages: tuple[Message, ...]
    answer: str
    source: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How an engine samples ``n`` responses a prompt; ``temperature`` 0 is greedy, ``top_k`` -1 is off."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One generated response. ``logprobs[t]`` is the engine's log-prob of ``token_ids[t]``."""

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    weight_version: int


@dataclass(frozen=True)
class Score:
    """``reward`` is what training sees, ``clean`` what it would be without noise.

    ``error`` is set when scoring failed: the sample is counted and left out of the update.
    """

    reward: float
    clean: float
    error: str | None = None


@dataclass(frozen=True)
class Rollouts:
    """A scored batch of B responses, as the trainers take it."""

    tokens: Tensor  # [B, S] int64, prompt then response, right-padded
    prompt_lens: Tensor  # [B] int64
    response_lens: Tensor  # [B] int64
    response_mask: Tensor  # [B, T] bool, False on padding, tool tokens and failed samples
    rollout_logprobs: Tensor  # [B, T] float32, by the rollout engine
    rewards: Tensor  # [B, T] float32, what the critic's returns are made of
    scores: Tensor  # [B] float32, noisy outcome reward
    clean_scores: Tensor  # [B] float32
    finished: Tensor  # [B] bool, False where the response was cut at the length limit
    prompt_index: Tensor  # [B] int64; equal within a group
    weight_version: Tensor  # [B] int64
    logprobs: Tensor | None = None  # [B, T] float32, by the trainer before its update (proximal)
    ref_logprobs: Tensor | None = None  # [B, T] float32, by the frozen reference

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Valid response tokens in the whole batch: the losses' denominator."""
        return int(self.response_mask.sum())

    def select(self, rows: Tensor) -> Self:
        """The given rows [b], trimmed to their own longest sequence and response."""
        picked: dict[str, Any] = {
            f.name: None if (v := getattr(self, f.name)) is None else v[rows] for f in fields(self)
        }
        lens = picked["prompt_lens"] + picked["response_lens"]
        s, t = (int(x.max()) if x.numel() else 0 for x in (lens, picked["response_lens"]))
        for name, value in picked.items():
            if value is not None and value.dim() == 2:
                picked[name] = value[:, : (s if name == "tokens" else t)]
        return type(self)(**picked)

    def with_(self, **changes: Tensor) -> Self:
        """Return the same with some fields replaced."""
        return replace(self, **changes)

    def to(self, device: torch.device) -> Self:
        """Return the same on ``device``."""
        moved: dict[str, Any] = {f.name: v.to(device) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    def save(self, path: Path, **more: Tensor) -> None:
        """Write every tensor to a safetensors file, for a look at a batch that went wrong."""
        tensors = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        save_file({k: v.clone() for k, v in (tensors | more).items()}, path)  # clones: fields may share memory


@dataclass(frozen=True)
class Advantages:
    """Per-token advantages. ``values`` [B, T] is the scalar value, for measurement only."""

    advantages: Tensor  # [B, T] float32, not whitened
    values: Tensor | None = None


Metrics = dict[str, float]


def advantage_metrics(advantages: Tensor, mask: Tensor) -> Metrics:
    """Mean and population sd over the valid tokens; NaN where there is none."""
    valid = advantages[mask].double()
    return {"advantage/mean": float(valid.mean()), "advantage/std": float(valid.std(correction=0))}


@dataclass(frozen=True)
class Generated:
    """One batch from the stream: the tensors, what a person reads of them, and measurements."""

    rollouts: Rollouts
    rows: list[dict[str, Any]]
    metrics: Metrics
