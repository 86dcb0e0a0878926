from __future__ import annotations

import math

import pytest
import torch
from algo_reference import mean, reference_cvar_advantage, reference_entropic_advantage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.risk_advantage import cvar_advantages, entropic_advantages, head_trust


def batch(seed: int, m: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return values (ascending), targets, and a mask with holes.

    Values and targets are NaN where masked; the last row has no valid token.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 5, m, generator=generator, dtype=dtype).sort(-1).values
    targets = torch.randn(3, 5, m, generator=generator, dtype=dtype)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    mask[2] = False
    return values.masked_fill(~mask[..., None], math.nan), targets.masked_fill(~mask[..., None], math.nan), mask


def mean_difference(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, targets.mean(-1) - values.mean(-1), 0.0)


@given(st.integers(0, 2**31), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_cvar_against_reference(seed: int, k: int) -> None:
    values, targets, mask = batch(seed)
    advantages = cvar_advantages(values, targets, mask, k / 8)
    for b in range(3):
        steps = mask[b].nonzero().flatten().tolist()
        for t in steps:
            prompt = values[b, steps[0]].tolist()
            expected = reference_cvar_advantage(prompt, values[b, t].tolist(), targets[b, t].tolist(), k)
            assert advantages[b, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert (advantages[~mask] == 0).all()


def test_cvar_by_hand() -> None:
    """The prompt's atoms are 0..3 and a = 1/2, so v = 1.5. Z falls short of v by (1.5 + 0.5) / 4, and y by 1.5 / 4."""
    values = torch.tensor([[[9.0, 9, 9, 9], [0, 1, 2, 3], [0, 1, 2, 3]]])
    targets = torch.tensor([[[9.0, 9, 9, 9], [0, 2, 2, 50], [3, 0, 1, 2]]])
    mask = torch.tensor([[False, True, True]])
    assert cvar_advantages(values, targets, mask, 0.5).tolist() == [[0.0, 0.25, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limits_are_the_mean_to_the_last_bit(dtype: torch.dtype) -> None:
    values, targets, mask = batch(1, dtype=dtype)
    expected = mean_difference(values, targets, mask)
    assert torch.equal(cvar_advantages(values, targets, mask, 1.0), expected)
    assert torch.equal(entropic_advantages(values, targets, mask, 0.0), expected)


@given(st.integers(0, 2**31), st.floats(-4, 4).filter(lambda b: abs(b) > 1e-3))
@settings(max_examples=30, deadline=None)
def test_entropic_against_reference(seed: int, b: float) -> None:
    values, targets, mask = batch(seed)
    advantages = entropic_advantages(values, targets, mask, b)
    for row, t in mask.nonzero().tolist():
        expected = reference_entropic_advantage(values[row, t].tolist(), targets[row, t].tolist(), b)
        assert advantages[row, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert (advantages[~mask] == 0).all()


@pytest.mark.parametrize("b", [1e-6, -1e-6, 1e-12])
def test_a_small_b_tends_to_the_mean_without_cancellation(b: float) -> None:
    values, targets, mask = batch(2, dtype=torch.float32)
    assert_close(entropic_advantages(values, targets, mask, b), mean_difference(values, targets, mask))


@pytest.mark.parametrize("b", [50.0, -50.0, 1e6, -1e6])
def test_a_large_b_is_finite_and_keeps_the_order(b: float) -> None:
    values = torch.linspace(0, 1, 8).expand(1, 3, 8)
    targets = torch.stack((torch.zeros(8), torch.full((8,), 0.5), torch.ones(8)))[None]
    advantages = entropic_advantages(values, targets, torch.ones(1, 3, dtype=torch.bool), b)
    assert advantages.isfinite().all()
    assert (advantages.diff(dim=1) >= 0).all()
    assert advantages[0, 2] > advantages[0, 0]


def test_beyond_the_largest_exponent_a_better_target_still_gains_more() -> None:
    values = torch.zeros(1, 2, 4)
    targets = torch.tensor([[[1.0] * 4, [1.1] * 4]])
    advantages = entropic_advantages(values, targets, torch.ones(1, 2, dtype=torch.bool), 200.0)
    assert advantages[0, 0] < advantages[0, 1] < math.inf


def test_entropic_shuns_or_seeks_spread() -> None:
    values, mask = torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)
    spread = torch.tensor([[[-1.0, 1.0]]])
    assert entropic_advantages(values, spread, mask, -1.0) < 0 < entropic_advantages(values, spread, mask, 1.0)


def test_head_trust_against_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    heads = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).sort(-1).values
    advantages, mask = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[True, True, False], [True] * 3])
    trusted = head_trust(advantages, heads.masked_fill(~mask[..., None, None], math.nan), mask, 0.7)
    for b, t in mask.nonzero().tolist():
        means = [mean(head) for head in heads[b, t].tolist()]
        q = [mean(atom) for atom in heads[b, t].T.tolist()]
        s = mean([(x - mean(means)) ** 2 for x in means]) ** 0.5
        sigma = mean([(x - mean(q)) ** 2 for x in q]) ** 0.5
        assert trusted[b, t].item() == pytest.approx(advantages[b, t].item() / (1 + 0.7 * s / sigma), rel=1e-12)
    assert trusted[0, 2] == 0


def test_head_trust_where_it_changes_nothing() -> None:
    heads, advantages = torch.randn(2, 3, 4, 5).sort(-1).values, torch.randn(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(head_trust(advantages, heads, mask, 0.0), advantages)
    assert torch.equal(head_trust(advantages, heads[:, :, :1], mask, 5.0), advantages)
    for atom in (0.1, 0.3, 0.7, 123.4):  # rounding of the means must count neither as width nor as disagreement
        assert torch.equal(head_trust(advantages, torch.full((2, 3, 3, 7), atom), mask, 5.0), advantages)


def test_head_trust_far_from_zero_in_float32() -> None:
    heads = 1e4 + torch.randint(8, (1, 3, 4, 200)).sort(-1).values / 2**7  # exact in float32
    advantages, mask = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    exact = head_trust(advantages.double(), heads.double(), mask, 5.0)
    assert_close(head_trust(advantages, heads, mask, 5.0).double(), exact, rtol=1e-5, atol=0)


def test_heads_that_disagree_about_a_law_without_width_are_not_trusted() -> None:
    heads = torch.tensor([0.1, 0.3])[None, None, :, None].expand(1, 1, 2, 6)
    assert head_trust(torch.ones(1, 1), heads, torch.ones(1, 1, dtype=torch.bool), 1.0).item() == 0


def test_bad_input() -> None:
    values, targets, mask = batch(4)
    heads = values.unsqueeze(2)
    for a in (0.0, 1.5):
        with pytest.raises(ValueError, match="tail"):
            cvar_advantages(values, targets, mask, a)
    with pytest.raises(ValueError, match="finite"):
        entropic_advantages(values, targets, mask, math.inf)
    with pytest.raises(ValueError, match="expected"):
        cvar_advantages(values, targets, mask[:, 1:], 0.5)
    with pytest.raises(ValueError, match="kappa"):
        head_trust(values[..., 0], heads, mask, -1.0)
    with pytest.raises(ValueError, match="heads"):
        head_trust(values[..., 0], values, mask, 1.0)
