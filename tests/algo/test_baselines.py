from __future__ import annotations

import math

import pytest
import torch
from algo_reference import reference_gae, reference_robust_advantages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import scalar_gae
from dvpo_service.algo.baselines.dr_grpo import dr_grpo
from dvpo_service.algo.baselines.gae import value_loss
from dvpo_service.algo.baselines.grpo import grpo
from dvpo_service.algo.baselines.reinforce_plus_plus import reinforce_plus_plus
from dvpo_service.algo.baselines.rloo import rloo
from dvpo_service.algo.baselines.robust_gae import robust_gae

UNIT = st.one_of(st.sampled_from((0.0, 1.0)), st.floats(0, 1))
GROUPED = [grpo, dr_grpo, rloo]


def outcomes(*rewards: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return sequences of three tokens with the reward on the second.

    The last token of the first sequence is masked and has a NaN reward.
    """
    mask = torch.ones(len(rewards), 3, dtype=torch.bool)
    mask[0, 2] = False
    table = torch.zeros(len(rewards), 3, dtype=dtype)
    table[:, 1] = torch.tensor(rewards, dtype=dtype)
    return table.masked_fill(~mask, math.nan), mask


def test_by_hand() -> None:
    """Group 7 has outcomes 1, 0, 0, 1 (mean 1/2, sample sd sqrt(1/3)), group -2 has 4 and 1."""
    rewards, mask = outcomes(1, 4, 0, 0, 1, 1)
    groups = torch.tensor([7, -2, 7, 7, -2, 7])
    half, third = 0.5 / (1 / 3) ** 0.5, 2 / 3
    expected = {
        grpo: [half, 1.5 / 4.5**0.5, -half, -half, -1.5 / 4.5**0.5, half],
        dr_grpo: [0.5, 1.5, -0.5, -0.5, -1.5, 0.5],
        rloo: [third, 3, -third, -third, -3, third],
    }
    for estimator, per_sequence in expected.items():
        wide = torch.tensor(per_sequence, dtype=torch.float64)[:, None].expand(6, 3)
        assert_close(estimator(rewards, mask, groups), torch.where(mask, wide, 0.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", GROUPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_spread_or_no_company_is_exactly_zero(estimator, dtype: torch.dtype) -> None:
    rewards, mask = outcomes(0.1, 0.1, 0.1, 5.0, dtype=dtype)
    advantages = estimator(rewards, mask, torch.tensor([3, 3, 3, 0]))
    assert (advantages == 0).all()
    assert advantages.dtype == dtype


@pytest.mark.parametrize("estimator", GROUPED)
def test_a_failed_sequence_does_not_count(estimator) -> None:
    rewards, mask = outcomes(1, 0, 0.25, math.nan)
    mask[3] = False
    groups = torch.tensor([1, 1, 1, 1])
    advantages = estimator(rewards, mask, groups)
    assert torch.equal(advantages[:3], estimator(rewards[:3], mask[:3], groups[:3]))
    assert (advantages[3] == 0).all()
    assert (estimator(rewards, torch.zeros_like(mask), groups) == 0).all()
    assert estimator(rewards[:0], mask[:0], groups[:0]).shape == (0, 3)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_groups_are_apart_and_centred(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 4, generator=generator) < 0.6
    rewards = torch.randn(9, 4, generator=generator, dtype=torch.float64).masked_fill(~mask, math.nan)
    groups = torch.randint(3, (9,), generator=generator)
    for estimator in GROUPED:
        whole = estimator(rewards, mask, groups)
        for group in groups.unique():
            of_group = groups == group
            assert_close(estimator(rewards[of_group], mask[of_group], groups[of_group]), whole[of_group])
            first = [
                row[valid][0].item() for row, valid in zip(whole[of_group], mask[of_group], strict=True) if any(valid)
            ]
            assert math.fsum(first) == pytest.approx(0, abs=1e-9)
        assert (whole[~mask] == 0).all()


def test_grouped_bad_input() -> None:
    rewards, mask = outcomes(1, 2)
    with pytest.raises(ValueError, match="groups"):
        grpo(rewards, mask, torch.tensor([1]))


def test_reinforce_plus_plus_by_hand() -> None:
    rewards = torch.tensor([[1.0, 7.0, 2.0, 4.0], [math.nan] * 4])
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    assert reinforce_plus_plus(rewards, mask, 0.5).tolist() == [[3.0, 0.0, 4.0, 4.0], [0.0] * 4]


def test_value_loss_by_hand() -> None:
    """The clip is 0.5. A larger move away from the return counts in full; a larger move towards it is clipped."""
    old, returns = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, math.nan]])
    values = torch.tensor([[-2.0, 0.8, 0.4, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    loss, clipped = value_loss(values, returns, mask, denominator=3)
    assert loss.item() == pytest.approx(0.5 * (9 + 0.04 + 0.36) / 3)
    assert not clipped.any()
    loss, clipped = value_loss(values, returns, mask, old_values=old, clip=0.5, denominator=3)
    assert loss.item() == pytest.approx(0.5 * (9 + 0.25 + 0.36) / 3)
    assert clipped.tolist() == [[False, True, False, False]]
    loss.backward()
    assert_close(values.grad, torch.tensor([[-1.0, 0.0, -0.2, 0.0]]))


def test_value_loss_parts_add_up_in_float32() -> None:
    values, returns, old = torch.randn(3, 4, 5).bfloat16()
    mask = torch.rand(4, 5) < 0.5
    whole, _ = value_loss(values, returns, mask, old_values=old, clip=0.2, denominator=9.0)
    halves = [
        value_loss(values[h], returns[h], mask[h], old_values=old[h], clip=0.2, denominator=9.0)[0]
        for h in (slice(2), slice(2, 4))
    ]
    assert whole.dtype == torch.float32
    assert_close(halves[0] + halves[1], whole)
    for clip, old_values in ((0.2, None), (0.0, old)):
        with pytest.raises(ValueError, match="clip"):
            value_loss(values, returns, mask, old_values=old_values, clip=clip, denominator=1)


def robust_batch(seed: int, t: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return rewards, values, mask, v_end and ended; rewards and values are NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, t, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, t, generator=generator) < 0.7
    ended = torch.tensor([True, False, True])
    v_end = torch.randn(3, generator=generator, dtype=torch.float64).masked_fill(ended, 0)
    return rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan), mask, v_end, ended


@given(st.integers(0, 2**31), st.integers(1, 8), UNIT, UNIT, UNIT)
@settings(max_examples=40, deadline=None)
def test_robust_gae_against_reference(seed: int, t: int, gamma: float, lam: float, rho: float) -> None:
    rewards, values, mask, v_end, ended = robust_batch(seed, t)
    advantages, returns = robust_gae(rewards, values, mask, v_end, gamma, lam, rho, -1.5, ended)
    for b in range(3):
        args = rewards[b].tolist(), values[b].tolist(), mask[b].tolist(), v_end[b].item()
        expected = reference_robust_advantages(*args, gamma, lam, rho, -1.5, bool(ended[b]))
        assert_close(advantages[b], torch.tensor(expected, dtype=torch.float64))
    assert_close(returns, torch.where(mask, values + advantages, 0.0))
    per_token = robust_gae(rewards, values, mask, v_end, gamma, torch.full((3, 1), lam), rho, -1.5, ended)
    assert_close(per_token[0], advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_contamination_it_is_gae_to_the_last_bit(dtype: torch.dtype) -> None:
    rewards, values, mask, v_end, ended = robust_batch(1, t=200)
    args = rewards.to(dtype), values.to(dtype), mask, v_end.to(dtype), 0.99, 0.95
    for robust, expected in zip(robust_gae(*args, 0.0, -9.0, ended), scalar_gae(*args), strict=True):
        assert torch.equal(robust, expected)
    lists = rewards[0].tolist(), values[0].tolist(), mask[0].tolist(), v_end[0].item()
    exact = torch.tensor(reference_gae(*lists, 0.99, 0.95), dtype=dtype)
    assert_close(scalar_gae(*args)[0][0], exact, rtol=1e-4, atol=1e-4)


def test_robust_gae_by_hand() -> None:
    """gamma 1, rho 1/2, worst -2, lambda 0. The last token, where the sequence ended: 1 - 3. The token before it:
    0 + (3 - 2)/2 - 1.
    """
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    mask, none = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1)
    for ended, last in ((True, -2.0), (False, -3.0)):
        advantages, _ = robust_gae(rewards, values, mask, none, 1.0, 0.0, 0.5, -2.0, torch.tensor([ended]))
        assert advantages.tolist() == [[-0.5, last]]


def test_more_contamination_never_raises_a_return() -> None:
    rewards, values, mask, v_end, ended = robust_batch(2)
    worst = min(values[mask].min().item(), v_end.min().item(), -20.0)
    returns = [robust_gae(rewards, values, mask, v_end, 0.9, 0.8, rho, worst, ended)[1] for rho in (0, 0.3, 1)]
    assert (returns[0] >= returns[1]).all()
    assert (returns[1] >= returns[2]).all()


def test_robust_bad_input() -> None:
    rewards, values, mask, v_end, ended = robust_batch(3)
    with pytest.raises(ValueError, match="expected"):
        robust_gae(rewards, values, mask, v_end[:1], 1.0, 0.9, 0.1, 0.0, ended)
    with pytest.raises(ValueError, match="ended"):
        robust_gae(rewards, values, mask, v_end, 1.0, 0.9, 0.1, 0.0, ended[:1])
    for rho, worst in ((1.5, 0.0), (0.1, math.nan)):
        with pytest.raises(ValueError, match="rho"):
            robust_gae(rewards, values, mask, v_end, 1.0, 0.9, rho, worst, ended)


def test_values_that_stayed_within_the_clip_do_not_count_as_clipped() -> None:
    """In float32, where old + (new - old) is not new. Held against moves of both signs and all sizes below the clip."""
    rng = torch.Generator().manual_seed(0)
    old = torch.randn(64, 64, generator=rng)
    moved = old + torch.rand(64, 64, generator=rng) * 1.9 - 0.95
    mask = torch.ones(64, 64, dtype=torch.bool)
    returns = torch.randn(64, 64, generator=rng)
    _, clipped = value_loss(moved, returns, mask, old_values=old, clip=1.0, denominator=1.0)
    assert not clipped.any()
    _, clipped = value_loss(old + 3, old + 9, mask, old_values=old, clip=1.0, denominator=1.0)
    assert clipped.all(), "far outside, and away from the return"
