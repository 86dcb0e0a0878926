"""Whether the critic's values can be returns at all: a value beyond every return seen has run away."""

from __future__ import annotations

from torch import Tensor

from dvpo_service.algo.advantages import returns_to_go
from dvpo_service.algo.masks import masked_sum


def largest_return(rewards: Tensor, mask: Tensor, gamma: float) -> float:
    """Return the largest absolute return of a batch; 0 where no token is valid.

    Args:
      rewards: [B, T], 0 where masked.
      mask: [B, T] bool, the valid tokens.
    """
    return float(returns_to_go(rewards, mask, gamma).abs().max()) if mask.any() else 0.0


def value_excess(values: Tensor, mask: Tensor, largest: float) -> float:
    """Return by how much the mean value of the valid tokens is beyond the largest return, as a share of it.

    0 means within, 1 means twice the largest return. It is 0 where no return but 0 was seen.

    Args:
      values: [B, T], the critic's means; anything where masked.
      largest: the largest absolute return seen so far.
    """
    if largest == 0 or not mask.any():
        return 0.0
    mean = abs(float(masked_sum(values, mask)) / float(mask.sum()))
    return max(0.0, mean / largest - 1.0)
