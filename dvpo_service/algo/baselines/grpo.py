"""GRPO: the outcome standardised within its group (DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.baselines.groups import grouped_outcomes, over_tokens


@torch.no_grad()
def grpo(rewards: Tensor, mask: Tensor, groups: Tensor, eps: float = 1e-6) -> Tensor:
    """``(outcome - group mean) / (group sd + eps)`` on every valid token, [B, T].

    The sd is the sample sd (divided by n - 1), as in TRL and verl; the paper does not say. A group of one,
    or one whose outcomes are all equal, gets 0.

    Args:
      rewards: [B, T]; a sequence's outcome is the sum over its valid tokens.
      mask: [B, T] bool.
      groups: [B] int64, equal for the answers to one prompt.
      eps: added to the sd, in units of the outcome.

    Raises ValueError for shapes that do not fit.
    """
    found = grouped_outcomes(rewards, mask, groups)
    sd = (found.squares / (found.count - 1).clamp(min=1)).sqrt()
    return over_tokens(found.deviation / (sd + eps), rewards, mask)
