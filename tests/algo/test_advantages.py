from __future__ import annotations

import math

import pytest
import torch
from algo_reference import reference_gae
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import (
    distributional_gae,
    mixture_targets,
    scalar_gae,
    whiten,
    whitening_sums,
)

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(seed: int, b: int = 3, t: int = 6, m: int = 4) -> Batch:
    """rewards, values (sorted), mask with holes, z_end."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=generator) < 0.7
    rewards = torch.randn(b, t, generator=generator, dtype=torch.float64) * mask
    values = torch.randn(b, t, m, generator=generator, dtype=torch.float64).sort(-1).values
    z_end = torch.randn(b, m, generator=generator, dtype=torch.float64).sort(-1).values
    z_end[0] = 0
    return rewards, values, mask, z_end


def insert_masked(data: Batch, at: int, junk: float) -> Batch:
    """The same sequences with a masked column at position ``at`` that holds ``junk``."""
    rewards, values, mask, z_end = data

    def widen(x: Tensor, fill: float) -> Tensor:
        column = torch.full_like(x[:, :1], fill)
        return torch.cat((x[:, :at], column, x[:, at:]), 1)

    return widen(rewards, junk), widen(values, junk), widen(mask, False), z_end


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_gae_against_reference(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask, z_end = batch(seed)
    targets = distributional_gae(rewards, values, mask, z_end, gamma, lam)
    for b in range(3):
        for j in range(4):
            args = rewards[b].tolist(), values[b, :, j].tolist(), mask[b].tolist(), z_end[b, j].item()
            expected = torch.tensor(reference_gae(*args, gamma, lam), dtype=torch.float64)
            assert_close(targets[b, :, j], torch.where(mask[b], values[b, :, j] + expected, 0.0))


@given(st.integers(0, 2**31), st.integers(0, 6), st.sampled_from((math.nan, 1e9, math.inf)))
@settings(max_examples=40, deadline=None)
def test_a_masked_token_changes_nothing_for_others(seed: int, at: int, junk: float) -> None:
    """Wherever it stands: padding at the end, a tool token in the middle."""
    data = batch(seed)
    wide = insert_masked(data, at, junk)
    keep = [t for t in range(7) if t != at]
    seeds = torch.tensor([5, 6, 7])
    for lam in (0.0, 0.9, 1.0):
        assert torch.equal(distributional_gae(*data, 0.9, lam), distributional_gae(*wide, 0.9, lam)[:, keep])
        narrow, wider = mixture_targets(*data, 0.9, lam, seeds), mixture_targets(*wide, 0.9, lam, seeds)
        assert torch.equal(narrow, wider[:, keep])
        assert (wider[:, at] == 0).all()


def test_lambda_one_is_the_return_and_lambda_zero_one_step() -> None:
    rewards, values, _, z_end = batch(1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    returns, following = z_end.clone(), torch.cat((values[:, 1:], z_end[:, None]), 1)
    for t in reversed(range(6)):
        returns = rewards[:, t, None] + 0.9 * returns
        assert_close(distributional_gae(rewards, values, mask, z_end, 0.9, 1.0)[:, t], returns)
    one_step = rewards[..., None] + 0.9 * following
    assert_close(distributional_gae(rewards, values, mask, z_end, 0.9, 0.0), one_step)


def test_scalar_gae_is_the_mean_of_the_distributional_one() -> None:
    rewards, values, mask, z_end = batch(2)
    targets = distributional_gae(rewards, values, mask, z_end, 0.99, 0.9)
    advantages, returns = scalar_gae(rewards, values.mean(-1), mask, z_end.mean(-1), 0.99, 0.9)
    assert_close(returns, targets.mean(-1))
    assert_close(advantages, torch.where(mask, targets.mean(-1) - values.mean(-1), 0.0))


def test_rewards_on_masked_tokens_are_not_read() -> None:
    rewards, values, mask, z_end = batch(3)
    expected = distributional_gae(rewards, values, mask, z_end, 1.0, 0.9)
    assert torch.equal(distributional_gae(rewards.masked_fill(~mask, 7.0), values, mask, z_end, 1.0, 0.9), expected)


def test_mixture_equals_eq2_at_both_ends_and_in_the_mean() -> None:
    n = 4000
    rewards, values, mask, z_end = (x[1:2].expand(n, *x.shape[1:]) for x in batch(4))
    seeds = torch.arange(n)
    for lam in (0.0, 1.0):
        exact = distributional_gae(rewards[:1], values[:1], mask[:1], z_end[:1], 0.9, lam).sort(-1).values
        assert_close(mixture_targets(rewards[:1], values[:1], mask[:1], z_end[:1], 0.9, lam, seeds[:1]), exact)
    sampled = mixture_targets(rewards, values, mask, z_end, 0.9, 0.6, seeds)
    expected = distributional_gae(rewards[:1], values[:1], mask[:1], z_end[:1], 0.9, 0.6)[0].mean(-1)
    error = (sampled.mean((0, 2)) - expected).abs()
    assert (error <= 5 * sampled.mean(-1).std(0) / n**0.5 + 1e-12).all()
    assert (sampled.diff(dim=-1) >= 0).all()


def test_mixture_keeps_the_law_that_eq2_narrows() -> None:
    """A critic that is right (the return is N(0,1) at the end, unknown before) must stay right."""
    n, t, m = 400, 60, 50
    levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    z = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).icdf(levels)
    rewards = torch.zeros(n, t, dtype=torch.float64)
    rewards[:, -1] = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    args = rewards, z.expand(n, t, m), torch.ones(n, t, dtype=torch.bool), torch.zeros(n, m)
    mixture = mixture_targets(*args, 1.0, 0.9, torch.arange(n))[:, 0]
    law = distributional_gae(*args, 1.0, 0.9)[:, 0].mean(0)  # its quantile functions, averaged
    assert mixture.flatten().std().item() == pytest.approx(z.std().item(), abs=0.03)
    assert law.std() < 1.0


def test_coins_do_not_depend_on_the_company() -> None:
    rewards, values, mask, z_end = batch(5)
    seeds = torch.tensor([11, 2**62, -3])
    whole = mixture_targets(rewards, values, mask, z_end, 1.0, 0.5, seeds)
    for order in ([2, 0, 1], [1], [0, 2]):
        part = mixture_targets(rewards[order], values[order], mask[order], z_end[order], 1.0, 0.5, seeds[order])
        assert torch.equal(part, whole[order])
    assert not torch.equal(whole, mixture_targets(rewards, values, mask, z_end, 1.0, 0.5, seeds + 1))


def test_whitening_is_global() -> None:
    advantages = torch.randn(4, 6, dtype=torch.float64) * 3 + 2
    mask = torch.rand(4, 6) < 0.7
    mask[:, 0] = True
    advantages[~mask] = math.nan
    sums = whitening_sums(advantages, mask)
    assert_close(whitening_sums(advantages[:2], mask[:2]) + whitening_sums(advantages[2:], mask[2:]), sums)
    white = whiten(advantages, mask, sums)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()
    assert torch.equal(torch.cat((whiten(advantages[:2], mask[:2], sums), white[2:])), white)


def test_whitening_of_equal_or_no_advantages_is_zero() -> None:
    equal, mask = torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)
    assert whiten(equal, mask, whitening_sums(equal, mask)).abs().max() < 1e-6
    none = torch.zeros_like(mask)
    assert (whiten(equal, none, whitening_sums(equal, none)) == 0).all()


def test_bad_input() -> None:
    rewards, values, mask, z_end = batch(6)
    with pytest.raises(ValueError, match="expected"):
        distributional_gae(rewards[:, 1:], values, mask, z_end, 1.0, 0.9)
    with pytest.raises(ValueError, match="lambda"):
        distributional_gae(rewards, values, mask, z_end, 1.0, 1.1)
    with pytest.raises(ValueError, match="v_end"):
        scalar_gae(rewards, values, mask, z_end, 1.0, 0.9)
    with pytest.raises(ValueError, match="seed"):
        mixture_targets(rewards, values, mask, z_end, 1.0, 0.9, torch.tensor([1]))
