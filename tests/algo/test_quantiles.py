from __future__ import annotations

import math

import pytest
import torch
from algo_reference import tail_mean, tail_variance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dvpo_service.algo import quantiles as qs


def test_levels() -> None:
    assert qs.quantile_levels(4, "endpoint").tolist() == [0.25, 0.5, 0.75, 1.0]
    assert qs.quantile_levels(4, "midpoint").tolist() == [0.125, 0.375, 0.625, 0.875]
    assert qs.quantile_levels(1, "midpoint").tolist() == [0.5]
    with pytest.raises(ValueError, match="at least one"):
        qs.quantile_levels(0, "endpoint")
    with pytest.raises(ValueError, match="endpoint"):
        qs.quantile_levels(3, "middle")  # type: ignore[arg-type]


def test_tail_weights_do_not_truncate() -> None:
    weights = qs.tail_weights(100, 0.29, dtype=torch.float64)
    assert_close(weights[:29], torch.full((29,), 1 / 29, dtype=torch.float64))
    assert weights[29:].abs().max() == 0
    half = qs.tail_weights(10, 0.25, dtype=torch.float64)
    assert half[:4].tolist() == pytest.approx([0.4, 0.4, 0.2, 0.0])
    assert qs.tail_weights(10, 0.01).tolist() == [1.0] + [0.0] * 9
    with pytest.raises(ValueError, match="fraction"):
        qs.tail_weights(10, 0.0)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_tails_against_reference(xs: list[float], fraction: float) -> None:
    xs = sorted(xs)
    up, atoms = xs[::-1], torch.tensor(xs, dtype=torch.float64)
    assert qs.lower_tail_mean(atoms, fraction).item() == pytest.approx(tail_mean(xs, fraction), abs=1e-10)
    assert qs.upper_tail_mean(atoms, fraction).item() == pytest.approx(tail_mean(up, fraction), abs=1e-10)
    assert qs.lower_tail_variance(atoms, fraction).item() == pytest.approx(tail_variance(xs, fraction), abs=1e-8)
    assert qs.upper_tail_variance(atoms, fraction).item() == pytest.approx(tail_variance(up, fraction), abs=1e-8)


def test_a_tail_of_one_atom_has_no_variance_and_ignores_the_rest() -> None:
    atoms = torch.tensor([1.0, 2.0, math.inf])
    assert qs.lower_tail_mean(atoms, 0.1).item() == 1.0
    assert qs.lower_tail_variance(atoms, 0.1).item() == 0.0
    assert qs.lower_tail_mean(atoms[:2], 1.0).item() == 1.5


def test_crossing_rate() -> None:
    z = torch.tensor([[[0.0, 1.0, 0.5], [math.nan, 3.0, 2.0]]])  # [1, 2, 3], second token masked
    mask = torch.tensor([[True, False]])
    assert qs.crossing_count(z, mask).item() / 2 == 0.5  # the valid token has two pairs
    assert qs.crossing_count(z, torch.zeros_like(mask)).item() == 0.0
    assert qs.crossing_count(z[..., :1], mask).item() == 0.0
    heads = torch.tensor([[[[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]]])  # [B,T,H,M]: one of three pairs
    assert qs.crossing_count(heads, torch.tensor([[True]])).item() / 3 == pytest.approx(1 / 3)
