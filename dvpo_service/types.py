"""The data that passes between the stages of a step: one frozen dataclass per stage.

Axes: ``B`` sequences, ``S`` tokens of prompt + response (right-padded), ``T`` response tokens (right-padded, aligned so
that column 0 is the first response token), ``H`` critic heads, ``M`` quantiles. Every ``[B, T]`` field is defined where
``response_mask`` is True and is 0 elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str


def answer_text(answer: Any) -> str:
    """Return a reference answer as text: text as it is, another value as JSON."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Prompt:
    """One row of the data.

    Attributes:
      index: its position in the dataset, by which the ledger counts the row.
      answer: the reference answer: text (numbers too, as ``"2"``), a list or an object of JSON, or None.
      occurrence: how often the step drew the row before; each time it is sampled with seeds of its own.
      row: the row's columns as the file has them, without the prompt's own.
    """

    index: int
    messages: tuple[Message, ...]
    answer: Any
    source: str
    token_ids: tuple[int, ...] = ()
    occurrence: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How an engine samples ``n`` responses per prompt; ``temperature`` 0 is greedy, ``top_k`` -1 is off."""

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
class PartScore:
    """What one of several rewards gave a sample: ``raw``, NaN where it failed, and that times its weight."""

    name: str
    raw: float
    weighted: float


@dataclass(frozen=True)
class Score:
    """The score of one sample.

    Attributes:
      reward: the reward that training uses, with noise if the config adds some.
      clean: the reward without noise.
      error: why scoring failed, else None. A sample with an error is counted and left out of the update.
      metrics: what the reward measured besides, by name.
      parts: of several rewards, what each gave.
    """

    reward: float
    clean: float
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[PartScore, ...] = ()


@dataclass(frozen=True)
class Rollouts:
    """A scored batch of B responses, as the trainers receive it."""

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
        """Return B."""
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Return the number of valid response tokens in the whole batch, the denominator of the losses."""
        return int(self.response_mask.sum())

    def select(self, rows: Tensor) -> Self:
        """Return the given rows [b], with columns trimmed to the longest sequence and response among them."""
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
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def to(self, device: torch.device) -> Self:
        """Return a copy with all tensors on ``device``."""
        moved: dict[str, Any] = {f.name: v.to(device) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    def save(self, path: Path, **more: Tensor) -> None:
        """Write every tensor, and ``more``, to a safetensors file, for inspecting a batch that caused an error."""
        tensors = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        save_file({k: v.clone() for k, v in (tensors | more).items()}, path)  # clones: fields may share memory


@dataclass(frozen=True)
class Advantages:
    """Per-token advantages, and the critic's values if there is a critic."""

    advantages: Tensor  # [B, T] float32, not whitened
    values: Tensor | None = None  # [B, T] scalar values, for measurement only


Metrics = dict[str, float]


def advantage_metrics(advantages: Tensor, mask: Tensor) -> Metrics:
    """Return mean and population sd of the advantages over the valid tokens; NaN when no token is valid.

    Args:
      advantages: [B, T].
      mask: [B, T] bool.
    """
    valid = advantages[mask].double()
    return {"advantage/mean": float(valid.mean()), "advantage/std": float(valid.std(correction=0))}


@dataclass(frozen=True)
class Generated:
    """One batch from the stream: its tensors, sample rows for people to read, and measurements."""

    rollouts: Rollouts
    rows: list[dict[str, Any]]
    metrics: Metrics
