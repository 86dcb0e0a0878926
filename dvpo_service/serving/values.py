"""The value distribution after every token of a response, by a trained critic. Plain torch, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvpo_service.algo.quantiles import lower_tail_mean, upper_tail_mean
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads

RankBy = Literal["mean", "cvar", "upper_tail"]
DEFAULT_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class ValueQuery:
    """One response to value.

    ``levels``: which quantiles to return, each in [0, 1]; None for all M. ``alpha``, ``beta``: the tails' fractions,
    in (0, 1]; those the critic was trained with by default. ``only_last``: the state after the whole response alone.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    levels: tuple[float, ...] | None = DEFAULT_LEVELS
    alpha: float | None = None
    beta: float | None = None
    only_last: bool = False


@dataclass(frozen=True)
class ResponseValues:
    """Along one response: T + 1 states, state t after the prompt and the first t response tokens.

    ``levels`` [L]; ``quantiles`` [S][L]; ``mean``, ``cvar``, ``upper_tail`` and ``head_disagreement`` (population sd
    of the heads' means; 0 for one head) [S], with S = T + 1, or 1 when only the last state was asked for.
    """

    alpha: float
    beta: float
    levels: list[float]
    quantiles: list[list[float]]
    mean: list[float]
    cvar: list[float]
    upper_tail: list[float]
    head_disagreement: list[float]


class ValueModel:
    """A critic folder, loaded for scoring."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, device: torch.device | None = None):
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.critic = DistributionalCritic.from_pretrained(folder, trust_remote_code=trust_remote_code).to(self.device)
        spec = self.critic.spec
        self.heads, self.alpha, self.beta = spec.num_heads, spec.alpha, spec.beta
        self.levels = spec.levels()
        self.max_tokens: int | None = getattr(self.critic.backbone.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def values(self, queries: Sequence[ValueQuery]) -> list[ResponseValues]:
        """All queries in one padded forward pass, in order."""
        sequences = [torch.tensor([*q.prompt_ids, *q.response_ids]) for q in queries]
        tokens = pad_sequence(sequences, batch_first=True).to(self.device)
        prompt_lens = torch.tensor([len(q.prompt_ids) for q in queries], device=self.device)
        lengths = torch.tensor([len(s) for s in sequences], device=self.device)
        longest = max(len(q.response_ids) for q in queries)
        positions = response_positions(prompt_lens, longest + 1, tokens.shape[1])
        atoms = split_heads(self.critic(tokens, lengths, positions), self.heads).cpu()
        return [self._summary(z, q) for z, q in zip(atoms, queries, strict=True)]

    def _summary(self, z: Tensor, query: ValueQuery) -> ResponseValues:
        """``z`` [longest + 1, H, M] of one response."""
        last = len(query.response_ids)
        heads = z[last if query.only_last else 0 : last + 1].sort(-1).values
        law = heads.mean(-2)
        alpha, beta = query.alpha or self.alpha, query.beta or self.beta
        levels = self.levels.tolist() if query.levels is None else list(query.levels)
        return ResponseValues(
            alpha=alpha,
            beta=beta,
            levels=[round(level, 6) for level in levels],
            quantiles=interpolate(law, self.levels, torch.tensor(levels)).tolist(),
            mean=law.mean(-1).tolist(),
            cvar=lower_tail_mean(law, alpha).tolist(),
            upper_tail=upper_tail_mean(law, beta).tolist(),
            head_disagreement=heads.mean(-1).std(-1, correction=0).tolist(),
        )


def interpolate(law: Tensor, at: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [S, L] at ``levels`` [L] of ascending atoms ``law`` [S, M] that stand at levels ``at`` [M].

    Linear between atoms, constant beyond the outermost.
    """
    if law.shape[-1] == 1:
        return law.expand(-1, len(levels))
    right = torch.searchsorted(at, levels.to(at)).clamp(1, len(at) - 1)
    share = ((levels - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return torch.lerp(law[:, right - 1], law[:, right], share.to(law).expand(len(law), -1))


def rank(found: Sequence[ResponseValues], by: RankBy) -> list[int]:
    """Indices of the responses, best first by the value of their last state; equal ones stay in order."""
    scores: list[float] = [getattr(v, by)[-1] for v in found]
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def as_json(found: ResponseValues, tokens: Sequence[str], token_ids: Sequence[int]) -> dict[str, Any]:
    """One object a state: what was read last, and what is expected from there."""
    read: list[tuple[str | None, int | None]] = [(None, None), *zip(tokens, token_ids, strict=True)]
    states = [
        {
            "token": token,
            "token_id": token_id,
            "mean": found.mean[i],
            "cvar": found.cvar[i],
            "upper_tail": found.upper_tail[i],
            "head_disagreement": found.head_disagreement[i],
            "quantiles": found.quantiles[i],
        }
        for i, (token, token_id) in enumerate(read)
    ]
    return {"alpha": found.alpha, "beta": found.beta, "levels": found.levels, "states": states}
