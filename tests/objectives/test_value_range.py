"""Values are held against the returns that were seen."""

from __future__ import annotations

import math

import pytest
import torch

from dvpo_service.objectives.value_range import largest_return, value_excess

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_the_largest_return_is_over_all_tokens_discounted_and_unsigned() -> None:
    rewards = torch.tensor([[0.0, 2.0, 0.0], [-3.0, 0.0, 0.0]])
    assert largest_return(rewards, MASK, 1.0) == 3.0
    assert largest_return(rewards[:1], MASK[:1], 0.5) == 2.0
    assert largest_return(torch.tensor([[1.0, 1.0, 0.0]]), MASK[:1], 0.5) == 1.5
    assert largest_return(rewards, torch.zeros_like(MASK), 1.0) == 0.0


@pytest.mark.parametrize(
    ("mean", "largest", "excess"),
    [(0.5, 1.0, 0.0), (1.0, 1.0, 0.0), (2.0, 1.0, 1.0), (-3.0, 1.0, 2.0), (17.7, 1.0, 16.7), (5.0, 0.0, 0.0)],
)
def test_excess_is_what_the_mean_has_beyond_the_largest_return(mean: float, largest: float, excess: float) -> None:
    values = torch.tensor([[mean - 0.25, mean + 0.25, math.nan], [mean, math.inf, math.nan]])
    assert value_excess(values, MASK, largest) == pytest.approx(excess)


def test_a_batch_without_tokens_has_none() -> None:
    assert value_excess(torch.ones(2, 3), torch.zeros_like(MASK), 1.0) == 0.0
