from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dvpo_service.algo.robust_width import FLOOR, add_batch, no_widths, running_width


def normal(n: int = 4000, sd: float = 1.0) -> Tensor:
    return sd * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def width(*batches: Tensor) -> float:
    state = no_widths()
    for returns in batches:
        state = add_batch(state, returns)
    return running_width(state)


@pytest.mark.parametrize(("sd", "offset"), [(1.0, 0.0), (1e-3, 5.0), (1e4, -1e6)])
def test_it_is_the_sd_of_a_normal_distribution_at_any_scale(sd: float, offset: float) -> None:
    assert width(normal(sd=sd) + offset) == pytest.approx(sd, rel=1e-2)


@pytest.mark.parametrize(("share", "at_most"), [(0.05, 1.1), (0.3, 1.7)])
def test_spikes_hardly_move_it_whatever_their_size(share: float, at_most: float) -> None:
    spikes = normal(int(4000 * share)) * 1e6
    assert 1.0 < width(torch.cat((normal(4000 - len(spikes)), spikes))) < at_most


def test_0_1_rewards_have_their_interquartile_range() -> None:
    rewards = (torch.arange(100) < 70).float()
    assert width(rewards) == pytest.approx(1 / 1.349, rel=1e-3)
    assert 1.35 * width(rewards) >= 1  # the default clip leaves 0/1 rewards as they are


def test_it_is_the_mean_over_batches() -> None:
    assert width(normal(sd=1.0), normal(sd=3.0)) == pytest.approx(2.0, rel=1e-2)


def test_batches_without_a_range_are_left_out() -> None:
    mixed, solved = (torch.arange(100) < 70).float(), torch.ones(100)
    assert width(solved, mixed, solved, solved) == width(mixed)


def test_it_stays_above_a_share_of_the_largest() -> None:
    """A policy that is nearly always right leaves small differences, beside which a wrong answer must still count."""
    mixed, solved = (torch.arange(100) < 70).float(), normal(100, sd=1e-3)
    assert width(mixed, *[solved] * 1000) == pytest.approx(FLOOR * width(mixed))


def test_rare_rewards_have_a_width_by_wider_ranges() -> None:
    def rare(n: int) -> Tensor:
        return (torch.arange(100) < n).float()

    assert width(rare(15)) == pytest.approx(1 / 2.563, rel=1e-3)
    assert width(rare(4)) == pytest.approx(1 / 3.92, rel=1e-3)
    assert width(rare(4), rare(70)) == width(rare(70))


@pytest.mark.parametrize("batches", [[], [torch.zeros(0)], [torch.ones(9)], [torch.ones(1)]])
def test_without_any_spread_it_is_1(batches: list[Tensor]) -> None:
    assert width(*batches) == 1.0
