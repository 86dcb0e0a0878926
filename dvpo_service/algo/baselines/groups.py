"""What the critic-free estimators share: outcomes, and how far each is from its group's mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, zero_masked


@dataclass(frozen=True)
class GroupedOutcomes:
    """All [B] float64. A sequence without a valid token has deviation 0 and is counted in no group."""

    deviation: Tensor  # outcome minus the mean of its group
    count: Tensor  # sequences in its group
    squares: Tensor  # its group's sum of squared deviations


def grouped_outcomes(rewards: Tensor, mask: Tensor, groups: Tensor) -> GroupedOutcomes:
    """Outcomes (the sum of a sequence's valid rewards) against the mean of their group.

    rewards and mask [B, T]; groups [B] int64, equal for the answers to one prompt, any numbers in any order.
    Where all outcomes of a group are equal the deviations are exactly 0: they are taken from the group's
    least outcome first, so that no rounding of the mean is later divided by a spread of the same size.

    Raises ValueError for shapes that do not fit.
    """
    if rewards.dim() != 2 or rewards.shape != mask.shape or groups.shape != mask.shape[:1]:
        shapes = f"{tuple(rewards.shape)}, {tuple(mask.shape)}, {tuple(groups.shape)}"
        raise ValueError(f"expected rewards [B,T], mask [B,T] and groups [B], got {shapes}")
    outcome, scored = zero_masked(rewards, mask).double().sum(1), mask.any(1)
    ids, of_row = groups.unique(return_inverse=True)

    def per_row_sum(x: Tensor) -> Tensor:
        return x.new_zeros(len(ids)).index_add(0, of_row, torch.where(scored, x, 0.0))[of_row]

    high = torch.where(scored, outcome, torch.inf)
    least = outcome.new_full((len(ids),), torch.inf).scatter_reduce(0, of_row, high, "amin")[of_row]
    above = torch.where(scored, outcome - least, 0.0)
    count = per_row_sum(torch.ones_like(outcome))
    deviation = torch.where(scored, above - per_row_sum(above) / count.clamp(min=1), 0.0)
    return GroupedOutcomes(deviation, count, per_row_sum(deviation.square()))


def over_tokens(per_sequence: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """[B] -> [B, T] in the dtype of ``rewards``, float32 or better; 0 where masked."""
    wide = per_sequence.to(float32_or_better(rewards).dtype).unsqueeze(1).expand(mask.shape)
    return zero_masked(wide, mask)
