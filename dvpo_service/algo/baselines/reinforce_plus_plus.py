"""REINFORCE++: returns to go without a critic, normalised over the batch (arXiv 2501.03262)."""

from __future__ import annotations

from torch import Tensor

from dvpo_service.algo.advantages import returns_to_go


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return the discounted return to go of every valid token, [B, T], 0 where masked.

    The method also normalises over all valid tokens of the global batch. ``advantages.whiten`` does that, not this
    function.

    Args:
      rewards: [B, T], the outcome on the last valid token, minus a KL penalty on each token where the method is run as
        published.
      mask: [B, T] bool.
      gamma: discount, in [0, 1].

    Raises:
      ValueError: when the shapes do not fit, or gamma is outside [0, 1].
    """
    return returns_to_go(rewards, mask, gamma)
