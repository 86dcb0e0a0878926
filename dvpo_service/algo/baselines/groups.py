"""What the critic-free estimators share: outcomes, and how far each is from its group's mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, zero_masked


@dataclass(frozen=True)
class GroupedOutcomes:
    """Statistics of each sequence's group, all [B] float64.

    A sequence without a valid token has deviation 0 and is counted in no group.
    """

    deviation: Tensor  # the sequence's outcome minus the mean of its group
    count: Tensor  # sequences in its group
    squares: Tensor  # sum of the squared deviations in its group


def grouped_outcomes(rewards: Tensor, mask: Tensor, groups: Tensor) -> GroupedOutcomes:
    """Compare each sequence's outcome (the sum of its valid rewards) with the mean of its group.

    Where all outcomes of a group are equal, the deviations are exactly 0: the group's smallest outcome is subtracted
    first. Otherwise a rounding error of the mean would later be divided by a spread of the same size.

    Args:
      rewards: [B, T].
      mask: [B, T] bool.
      groups: [B] int64, equal for the answers to one prompt; any numbers in any order.

    Raises:
      ValueError: when the shapes do not fit.
    """
    if rewards.dim() != 2 or rewards.shape != mask.shape or groups.shape != mask.shape[:1]:
        shapes = f"{tuple(rewards.shape)}, {tuple(mask.shape)}, {tuple(groups.shape)}"
        raise ValueError(f"expected rewards [B,T], mask [B,T] and groups [B], got {shapes}")
    outcome = zero_masked(rewards, mask).double().sum(1)
    scored = mask.any(1)
    ids, group_of = groups.unique(return_inverse=True)

    def group_sum(x: Tensor) -> Tensor:
        return x.new_zeros(len(ids)).index_add(0, group_of, torch.where(scored, x, 0.0))[group_of]

    high = torch.where(scored, outcome, torch.inf)
    least = outcome.new_full((len(ids),), torch.inf).scatter_reduce(0, group_of, high, "amin")[group_of]
    above = torch.where(scored, outcome - least, 0.0)
    count = group_sum(torch.ones_like(outcome))
    deviation = torch.where(scored, above - group_sum(above) / count.clamp(min=1), 0.0)
    return GroupedOutcomes(deviation, count, group_sum(deviation.square()))


def over_tokens(per_sequence: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Return a number per sequence [B] on each of its tokens, [B, T], 0 where masked.

    The result has the dtype of ``rewards``, or float32 where that is narrower.
    """
    repeated = per_sequence.to(float32_or_better(rewards).dtype).unsqueeze(1).expand(mask.shape)
    return zero_masked(repeated, mask)
