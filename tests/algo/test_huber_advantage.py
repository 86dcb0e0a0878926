from __future__ import annotations

import math

import pytest
import torch
from algo_reference import reference_huber_advantage, reference_win_rate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.huber_advantage import huber_advantages

EVERY = torch.ones(1, 1, dtype=torch.bool)

# Atoms of every size, and of few values, so that pairs tie and lie exactly at the clip.
ATOMS = st.one_of(
    st.lists(st.sampled_from([-1.5, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=9),
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=9),
)
CLIPS = st.one_of(st.sampled_from([0.5, 1.0, 1.5]), st.floats(1e-3, 1e7))


def one(z: list[float], y: list[float], clip: float) -> float:
    """Return the advantage of a single token."""
    values, targets = (torch.tensor(x, dtype=torch.float64)[None, None] for x in (z, y))
    return float(huber_advantages(values, targets, EVERY, clip))


def batch(seed: int, b: int, t: int, m: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return values, targets and a mask with holes; what is masked is NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(b, t, m, generator=generator, dtype=torch.float64).to(dtype)
    targets = 2 * torch.randn(b, t, k, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(b, t, generator=generator) < 0.7
    return values.masked_fill(~mask[..., None], math.nan), targets.masked_fill(~mask[..., None], math.nan), mask


@given(ATOMS, ATOMS, CLIPS)
@settings(max_examples=300, deadline=None)
def test_against_the_double_loop(z: list[float], y: list[float], clip: float) -> None:
    largest = max(map(abs, [*z, *y]))
    assert one(z, y, clip) == pytest.approx(reference_huber_advantage(z, y, clip), rel=1e-12, abs=1e-14 * largest)


@given(st.integers(0, 2**31), *[st.integers(0, n) for n in (4, 6)], *[st.integers(1, 12)] * 2, st.floats(0.01, 10))
@settings(max_examples=60, deadline=None)
def test_any_shape_and_mask(seed: int, b: int, t: int, m: int, k: int, clip: float) -> None:
    values, targets, mask = batch(seed, b, t, m, k)
    advantages = huber_advantages(values, targets, mask, clip)
    assert advantages.shape == mask.shape
    for row, step in mask.nonzero().tolist():
        expected = reference_huber_advantage(values[row, step].tolist(), targets[row, step].tolist(), clip)
        assert advantages[row, step].item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert (advantages[~mask] == 0).all()


def test_more_tokens_than_a_chunk_and_their_order_change_nothing() -> None:
    values, targets, _ = batch(0, 1, 700, 5, 4)
    values, targets = values.nan_to_num(), targets.nan_to_num()
    every = torch.ones(1, 700, dtype=torch.bool)
    whole = huber_advantages(values, targets, every, 0.5)
    alone = [huber_advantages(values[:, t : t + 1], targets[:, t : t + 1], EVERY, 0.5) for t in range(700)]
    assert_close(whole, torch.cat(alone, 1), rtol=1e-13, atol=1e-15)
    assert_close(huber_advantages(values.flip(-1), targets.flip(-1), every, 0.5), whole, rtol=0, atol=0)


@given(ATOMS, ATOMS, CLIPS)
@settings(max_examples=100, deadline=None)
def test_it_is_bounded_odd_and_a_rise_of_the_target_raises_it(z: list[float], y: list[float], clip: float) -> None:
    here, slack = one(z, y, clip), 1e-14 * max(map(abs, [*z, *y]))
    assert abs(here) <= clip + slack
    assert one(y, z, clip) == pytest.approx(-here, rel=1e-12, abs=slack)
    assert one([-x for x in z], [-x for x in y], clip) == pytest.approx(-here, rel=1e-12, abs=slack)
    assert one(z, [x + 0.25 for x in y], clip) >= here - 2 * slack


@given(ATOMS, ATOMS)
@settings(max_examples=100, deadline=None)
def test_a_clip_that_no_pair_reaches_is_the_difference_of_means(z: list[float], y: list[float]) -> None:
    reach = max(abs(a - b) for a in y for b in z) + 1e-9
    expected = math.fsum(y) / len(y) - math.fsum(z) / len(z)
    for clip in (reach, 10 * reach, 1e300):
        assert one(z, y, clip) == pytest.approx(expected, rel=1e-12, abs=1e-14 * max(map(abs, [*z, *y])))


@pytest.mark.parametrize("clip", [1.0, 1.35, 40.0])
def test_for_0_1_rewards_it_is_the_difference_of_means_from_a_clip_of_1(clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(4, 6, 20, generator=generator) < 0.7).float()
    targets = (torch.rand(4, 6, 20, generator=generator) < 0.4).float()
    advantages = huber_advantages(values, targets, torch.ones(4, 6, dtype=torch.bool), clip)
    assert_close(advantages, targets.mean(-1) - values.mean(-1), rtol=0, atol=1e-7)


@given(ATOMS, ATOMS)
@settings(max_examples=100, deadline=None)
def test_a_small_clip_is_a_win_rate(z: list[float], y: list[float]) -> None:
    gaps = [abs(a - b) for a in y for b in z if a != b]
    clip = min([1.0, *gaps]) / 2  # smaller than every gap: nothing is left but signs
    if clip > 1e-6 * max(map(abs, [1.0, *z, *y])):
        assert one(z, y, clip) / clip == pytest.approx(reference_win_rate(z, y), abs=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_an_offset_costs_no_digits_of_float32(offset: float) -> None:
    values, targets = (torch.randint(16, (1, 3, 200)).sort(-1).values / 8 + offset for _ in range(2))  # exact
    mask = torch.ones(1, 3, dtype=torch.bool)
    exact = huber_advantages(values.double() - offset, targets.double() - offset, mask, 0.5)
    assert_close(huber_advantages(values, targets, mask, 0.5).double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 1.0])
def test_float32_agrees_with_float64(clip: float) -> None:
    values, targets, mask = batch(5, 8, 16, 200, 200, torch.float32)
    exact = huber_advantages(values.double(), targets.double(), mask, clip)
    # Of atoms that are about 10 apart.
    assert_close(huber_advantages(values, targets, mask, clip).double(), exact, rtol=1e-6, atol=3e-8)


def test_a_target_however_wild_counts_as_one_at_the_clip() -> None:
    z, ones = [0.0, 0.25, 1.0], [1.0, 0.5]
    for wild in (10.0, 1e9, 1e30, 1e300, math.inf):
        assert one(z, [*ones, wild], 1.0) == pytest.approx(one(z, [*ones, 2.0], 1.0), rel=1e-15)
        assert one(z, [*ones, -wild], 1.0) == pytest.approx(one(z, [*ones, -1.0], 1.0), rel=1e-15)


def test_a_nan_atom_makes_its_own_token_nan() -> None:
    values, targets, _ = batch(3, 2, 2, 4, 4)
    values, targets = values.nan_to_num(), targets.nan_to_num()
    values[0, 1, 2] = math.nan
    advantages = huber_advantages(values, targets, torch.ones(2, 2, dtype=torch.bool), 1.0)
    assert advantages.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_no_gradient_and_is_float32_or_better(dtype: torch.dtype) -> None:
    values, targets, mask = batch(1, 2, 3, 4, 1, dtype)
    advantages = huber_advantages(values.requires_grad_(), targets, mask, 1.0)
    assert not advantages.requires_grad
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert advantages.isfinite().all()


def test_bad_input() -> None:
    values, targets, mask = batch(4, 2, 3, 4, 4)
    for clip in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            huber_advantages(values, targets, mask, clip)
    for bad in ((values, targets, mask[:, 1:]), (values[0], targets, mask), (values, targets[:1], mask)):
        with pytest.raises(ValueError, match="expected"):
            huber_advantages(*bad, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        huber_advantages(values, targets[..., :0], mask, 1.0)
