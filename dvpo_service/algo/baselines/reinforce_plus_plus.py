"""REINFORCE++: returns to go without a critic, normalised over the batch (arXiv 2501.03262)."""

from __future__ import annotations

from torch import Tensor

from dvpo_service.algo.advantages import returns_to_go


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The discounted return to go of every valid token, [B, T].

    rewards [B, T] per token: the outcome on the last valid one, minus a KL penalty on each where the method
    is run as published. The normalisation over all valid tokens of the global batch is
    ``advantages.whiten``'s and not done here.

    Raises ValueError for shapes that do not fit or gamma outside [0, 1].
    """
    return returns_to_go(rewards, mask, gamma)
