"""GRPO: the outcome standardised within its group (DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.baselines.groups import grouped_outcomes, over_tokens


@torch.no_grad()
def grpo(rewards: Tensor, mask: Tensor, groups: Tensor, eps: float = 1e-6) -> Tensor:
    """Return ``(outcome - group mean) / (group sd + eps)`` on every valid token, [B, T], 0 where masked.

    The sd is the sample sd (divided by n - 1), as in TRL and verl; the paper does not say which it uses. A group of one
    gets 0, and so does a group whose outcomes are all equal.

    Args:
      rewards: [B, T]; a sequence's outcome is the sum over its valid tokens.
      mask: [B, T] bool.
      groups: [B] int64, equal for the answers to one prompt.
      eps: added to the sd, in units of the outcome.

    Raises:
      ValueError: when the shapes do not fit.
    """
    outcomes = grouped_outcomes(rewards, mask, groups)
    sd = (outcomes.squares / (outcomes.count - 1).clamp(min=1)).sqrt()
    return over_tokens(outcomes.deviation / (sd + eps), rewards, mask)
