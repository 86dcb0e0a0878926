"""RLOO: REINFORCE with the other answers' mean as baseline (arXiv 2402.14740)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.baselines.groups import grouped_outcomes, over_tokens


@torch.no_grad()
def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Return ``outcome - mean of the group's other outcomes`` on every valid token, [B, T], 0 where masked.

    This equals ``n / (n - 1)`` times the deviation from the mean of all n. A group of one has no other outcomes and so
    no baseline. It gets 0, because an outcome without a baseline says nothing about how good the answer was.

    Takes the arguments of ``grpo`` and raises ValueError as ``grpo`` does.
    """
    outcomes = grouped_outcomes(rewards, mask, groups)
    return over_tokens(outcomes.deviation * outcomes.count / (outcomes.count - 1).clamp(min=1), rewards, mask)
