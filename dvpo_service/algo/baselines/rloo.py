"""RLOO: REINFORCE with the other answers' mean as baseline (arXiv 2402.14740)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.baselines.groups import grouped_outcomes, over_tokens


@torch.no_grad()
def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """``outcome - mean of the group's other outcomes`` on every valid token, [B, T].

    That is ``n / (n - 1)`` times the deviation from the mean of all n. A group of one has no others, hence
    no baseline, and gets 0: a bare outcome would push on a policy that nothing is compared with.

    Arguments and ValueError as in ``grpo``.
    """
    found = grouped_outcomes(rewards, mask, groups)
    return over_tokens(found.deviation * found.count / (found.count - 1).clamp(min=1), rewards, mask)
