"""Compute the value distribution after every token of a response with a trained critic. Plain torch, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvpo_service.algo.quantiles import interpolate_quantiles, lower_tail_mean, upper_tail_mean
from dvpo_service.models.critic import DistributionalCritic, response_positions, split_heads

RankBy = Literal["mean", "cvar", "upper_tail"]
DEFAULT_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class ValueQuery:
    """One response to value.

    Attributes:
      prompt_ids, response_ids: the tokens.
      levels: levels of the quantiles to return, each in [0, 1]; None for all M atoms.
      alpha, beta: fractions of the lower and the upper tail, in (0, 1]; None for those the critic was trained with.
      only_last: return only the state after the whole response.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    levels: tuple[float, ...] | None = DEFAULT_LEVELS
    alpha: float | None = None
    beta: float | None = None
    only_last: bool = False


@dataclass(frozen=True)
class ResponseValues:
    """The value distributions along one response of T tokens.

    There are S = T + 1 states, and state t is after the prompt and the first t response tokens. S is 1 when only the
    last state was asked for.

    Attributes:
      alpha, beta: fractions of the lower and the upper tail.
      levels: [L].
      quantiles: [S][L].
      mean, cvar, upper_tail: [S]; ``cvar`` is the mean of the lower tail.
      head_disagreement: [S], the population standard deviation of the heads' means; 0 for one head.
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
    """A critic, loaded from its folder.

    Args:
      folder: as ``DistributionalCritic.save_pretrained`` writes it.
      trust_remote_code: allow the model's own code.
      device: the GPU by default, if there is one.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, device: torch.device | None = None):
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.critic = DistributionalCritic.from_pretrained(folder, trust_remote_code=trust_remote_code).to(self.device)
        spec = self.critic.spec
        self.heads, self.alpha, self.beta = spec.num_heads, spec.alpha, spec.beta
        self.levels = spec.levels()
        self.max_tokens: int | None = getattr(self.critic.backbone.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def values(self, queries: Sequence[ValueQuery]) -> list[ResponseValues]:
        """Return the values of each query, in order, from one padded forward pass."""
        sequences = [torch.tensor([*q.prompt_ids, *q.response_ids]) for q in queries]
        tokens = pad_sequence(sequences, batch_first=True).to(self.device)
        prompt_lens = torch.tensor([len(q.prompt_ids) for q in queries], device=self.device)
        lengths = torch.tensor([len(s) for s in sequences], device=self.device)
        longest = max(len(q.response_ids) for q in queries)
        positions = response_positions(prompt_lens, longest + 1, tokens.shape[1])
        atoms = split_heads(self.critic(tokens, lengths, positions), self.heads).cpu()
        return [self._summary(z, q) for z, q in zip(atoms, queries, strict=True)]

    def _summary(self, z: Tensor, query: ValueQuery) -> ResponseValues:
        """Summarise one response's atoms ``z`` [longest + 1, H, M]; the entries after its last state are padding."""
        last = len(query.response_ids)
        heads = z[last if query.only_last else 0 : last + 1].sort(-1).values
        distribution = heads.mean(-2)
        alpha = query.alpha or self.alpha
        beta = query.beta or self.beta
        levels = self.levels.tolist() if query.levels is None else list(query.levels)
        return ResponseValues(
            alpha=alpha,
            beta=beta,
            levels=[round(level, 6) for level in levels],
            quantiles=interpolate_quantiles(distribution, self.levels, torch.tensor(levels)).tolist(),
            mean=distribution.mean(-1).tolist(),
            cvar=lower_tail_mean(distribution, alpha).tolist(),
            upper_tail=upper_tail_mean(distribution, beta).tolist(),
            head_disagreement=heads.mean(-1).std(-1, correction=0).tolist(),
        )


def rank(values: Sequence[ResponseValues], by: RankBy) -> list[int]:
    """Return the responses' indices, best first by the value of the last state; equal responses keep their order."""
    scores: list[float] = [getattr(v, by)[-1] for v in values]
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def as_json(found: ResponseValues, tokens: Sequence[str], token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the values as JSON: one object per state, with the token that was read last (None for the prompt).

    Args:
      found: the T + 1 states of a response.
      tokens, token_ids: the T response tokens as text and as ids.
    """
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
