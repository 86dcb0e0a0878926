from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from algo_reference import reference_gae, reference_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.advantages import (
    _coins,
    distributional_gae,
    length_adaptive_lambda,
    mixture_targets,
    returns_to_go,
    scalar_gae,
    whiten,
)

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(seed: int, b: int = 3, t: int = 6, m: int = 4) -> Batch:
    """Return rewards, values (sorted), a mask with holes, and z_end."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=generator) < 0.7
    rewards = torch.randn(b, t, generator=generator, dtype=torch.float64) * mask
    values = torch.randn(b, t, m, generator=generator, dtype=torch.float64).sort(-1).values
    z_end = torch.randn(b, m, generator=generator, dtype=torch.float64).sort(-1).values
    z_end[0] = 0
    return rewards, values, mask, z_end


def insert_masked(data: Batch, at: int, junk: float) -> Batch:
    """Return the same sequences with a masked column at position ``at`` that contains ``junk``."""
    rewards, values, mask, z_end = data

    def widen(x: Tensor, fill: float) -> Tensor:
        column = torch.full_like(x[:, :1], fill)
        return torch.cat((x[:, :at], column, x[:, at:]), 1)

    return widen(rewards, junk), widen(values, junk), widen(mask, False), z_end


UNIT = st.one_of(st.sampled_from((0.0, 1.0)), st.floats(0, 1))


@given(st.integers(0, 2**31), st.integers(1, 9), UNIT, st.one_of(UNIT, st.just("per token")))
@settings(max_examples=60, deadline=None)
def test_gae_against_reference(seed: int, t: int, gamma: float, lam: float | str) -> None:
    rewards, values, mask, z_end = batch(seed, t=t)
    per_token = torch.rand(3, t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    trace = per_token.masked_fill(~mask, math.nan) if isinstance(lam, str) else lam
    targets = distributional_gae(rewards, values, mask, z_end, gamma, trace)
    advantages, returns = scalar_gae(rewards, values[..., 1], mask, z_end[:, 1], gamma, trace)
    for b in range(3):
        for j in range(4):
            args = rewards[b].tolist(), values[b, :, j].tolist(), mask[b].tolist(), z_end[b, j].item()
            expected = reference_gae(*args, gamma, per_token[b].tolist() if isinstance(lam, str) else lam)
            exact = torch.tensor(expected, dtype=torch.float64)
            assert_close(targets[b, :, j], torch.where(mask[b], values[b, :, j] + exact, 0.0))
            if j == 1:
                assert_close(advantages[b], exact)
                assert_close(returns[b], torch.where(mask[b], values[b, :, j] + exact, 0.0))


@given(st.integers(0, 2**31), st.integers(1, 9), UNIT, UNIT)
@settings(max_examples=40, deadline=None)
def test_mixture_against_its_recursion_coin_by_coin(seed: int, t: int, gamma: float, lam: float) -> None:
    rewards, values, mask, z_end = batch(seed, t=t)
    seeds = torch.tensor([seed, seed + 1, seed + 2])
    targets = mixture_targets(rewards, values, mask, z_end, gamma, lam, seeds)
    coins = _coins(mask, 4, torch.full_like(rewards, lam), seeds).tolist()  # slot 0 has the last valid token
    for b in range(3):
        last_first = [i for i in reversed(range(t)) if mask[b, i]]
        following = z_end[b].tolist()
        y = list(following)
        for slot, i in enumerate(last_first):
            picked = [y[j] if coins[b][slot][j] else following[j] for j in range(4)]
            y, following = [rewards[b, i].item() + gamma * x for x in picked], values[b, i].tolist()
            assert_close(targets[b, i], torch.tensor(sorted(y), dtype=torch.float64))
    assert (targets[~mask] == 0).all()


def test_a_lambda_per_token_may_be_constant_or_one_per_sequence() -> None:
    data = batch(7)
    one_each = torch.tensor([[0.2], [0.5], [1.0]])
    seeds = torch.arange(3)
    for b in range(3):
        part = tuple(x[b : b + 1] for x in data)
        lam = one_each[b].item()
        assert_close(distributional_gae(*data, 0.9, one_each)[b : b + 1], distributional_gae(*part, 0.9, lam))
        whole = mixture_targets(*data, 0.9, one_each, seeds)
        assert_close(whole[b : b + 1], mixture_targets(*part, 0.9, lam, seeds[b : b + 1]))


@pytest.mark.parametrize("gamma", [0.5, 0.999, 1.0])
def test_long_sequences_in_float32(gamma: float) -> None:
    t = 4096
    rewards, values, mask, z_end = batch(8, b=1, t=t, m=2)
    args = rewards, values[..., 0], mask, z_end[:, 0], gamma
    float32 = tuple(x.float() for x in args[:2])
    _, exact = scalar_gae(*args, 0.95)
    steps = [i for i in reversed(range(t)) if mask[0, i]]
    following = [z_end[0, 0].item()] + [values[0, i, 0].item() for i in steps[:-1]]
    b = [rewards[0, i].item() + gamma * 0.05 * v for i, v in zip(steps, following, strict=True)]
    expected = reference_scan(b, [gamma * 0.95] * len(b), z_end[0, 0].item())
    assert_close(exact[0, steps], torch.tensor(expected, dtype=torch.float64))
    assert_close(scalar_gae(*float32, mask, z_end[:, 0].float(), gamma, 0.95)[1].double(), exact, rtol=0, atol=1e-4)
    targets = distributional_gae(rewards.float(), values.float(), mask, z_end.float(), gamma, 0.95)
    assert targets.dtype == torch.float32
    assert_close(targets[..., 0].double(), exact, rtol=0, atol=1e-4)


@given(st.integers(0, 2**31), st.integers(0, 6), st.sampled_from((math.nan, 1e9, math.inf)))
@settings(max_examples=40, deadline=None)
def test_a_masked_token_changes_nothing_for_others(seed: int, at: int, junk: float) -> None:
    """The masked token may be anywhere: padding at the end, or a tool token in the middle."""
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


def test_a_row_depends_on_its_valid_tokens_alone_to_the_last_bit() -> None:
    """Over several chunks, in float32: a row in a batch and with holes equals the same row alone and without holes."""
    rewards, values, mask, z_end = (x.float() if x.is_floating_point() else x for x in batch(11, t=300, m=5))
    seeds = torch.arange(3)
    whole = distributional_gae(rewards, values, mask, z_end, 0.99, 0.95)
    mixed = mixture_targets(rewards, values, mask, z_end, 0.99, 0.95, seeds)
    scalar, _ = scalar_gae(rewards, values[..., 0], mask, z_end[:, 0], 0.99, 0.95)
    for b in range(3):
        valid = mask[b]
        r, v, full, end = rewards[b, valid][None], values[b, valid][None], mask[b, valid][None], z_end[b : b + 1]
        assert torch.equal(distributional_gae(r, v, full, end, 0.99, 0.95)[0], whole[b, valid])
        assert torch.equal(mixture_targets(r, v, full, end, 0.99, 0.95, seeds[b : b + 1])[0], mixed[b, valid])
        assert torch.equal(scalar_gae(r, v[..., 0], full, end[:, 0], 0.99, 0.95)[0][0], scalar[b, valid])


def test_a_right_critic_leaves_no_rounding_to_whiten() -> None:
    values, mask = torch.full((2, 300), 0.3), torch.ones(2, 300, dtype=torch.bool)
    advantages, _ = scalar_gae(torch.zeros(2, 300), values, mask, values[:, 0], 1.0, 0.95)
    assert (advantages == 0).all()


def test_returns_to_go_are_the_point_targets() -> None:
    rewards, values, mask, _ = batch(9)
    targets = distributional_gae(rewards, values, mask, torch.zeros(3, 4), 0.9, 1.0)
    assert_close(returns_to_go(rewards.masked_fill(~mask, math.nan), mask, 0.9)[..., None].expand(3, 6, 4), targets)


def test_length_adaptive_lambda() -> None:
    mask = torch.arange(100) < torch.tensor([0, 20, 40, 100])[:, None]
    assert_close(length_adaptive_lambda(mask, 0.05), torch.tensor([[0.0], [0.0], [0.5], [0.8]]))
    with pytest.raises(ValueError, match="alpha"):
        length_adaptive_lambda(mask, 0.0)


def test_neither_autocast_nor_bfloat16_costs_precision() -> None:
    rewards, values, mask, z_end = batch(10)
    exact = distributional_gae(rewards, values, mask, z_end, 0.99, 0.95)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = distributional_gae(rewards.float(), values.float(), mask, z_end.float(), 0.99, 0.95)
    assert_close(targets, exact.float())
    assert distributional_gae(rewards, values.bfloat16(), mask, z_end, 0.99, 0.95).dtype == torch.float32


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
    """A critic that is right must stay right. Here the return is N(0, 1), drawn at the end and unknown before."""
    n, t, m = 400, 60, 50
    levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    z = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).icdf(levels)
    rewards = torch.zeros(n, t, dtype=torch.float64)
    rewards[:, -1] = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    args = rewards, z.expand(n, t, m), torch.ones(n, t, dtype=torch.bool), torch.zeros(n, m)
    mixture = mixture_targets(*args, 1.0, 0.9, torch.arange(n))[:, 0]
    averaged = distributional_gae(*args, 1.0, 0.9)[:, 0].mean(0)  # the mean of Eq. 2's quantile functions
    assert mixture.flatten().std().item() == pytest.approx(z.std().item(), abs=0.03)
    assert averaged.std() < 1.0


def test_coins_do_not_depend_on_the_company() -> None:
    rewards, values, mask, z_end = batch(5)
    seeds = torch.tensor([11, 2**62, -3])
    whole = mixture_targets(rewards, values, mask, z_end, 1.0, 0.5, seeds)
    for order in ([2, 0, 1], [1], [0, 2]):
        part = mixture_targets(rewards[order], values[order], mask[order], z_end[order], 1.0, 0.5, seeds[order])
        assert torch.equal(part, whole[order])
    assert not torch.equal(whole, mixture_targets(rewards, values, mask, z_end, 1.0, 0.5, seeds + 1))


def test_whitening_reads_valid_tokens_only() -> None:
    advantages = torch.randn(4, 6, dtype=torch.float64) * 3 + 2
    mask = torch.rand(4, 6) < 0.7
    mask[:, 0] = True
    advantages[~mask] = math.nan
    white = whiten(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]))
def test_whitening_of_equal_or_no_advantages_is_exactly_zero(value: float, n: int, dtype: torch.dtype) -> None:
    equal, mask = torch.full((2, n), value, dtype=dtype), torch.ones(2, n, dtype=torch.bool)
    assert (whiten(equal, mask) == 0).all()
    assert (whiten(equal, torch.zeros_like(mask)) == 0).all()


@given(st.floats(-1e6, 1e6), st.floats(-8, 3), st.integers(0, 2**31))
def test_whitening_against_exact_arithmetic(mean: float, log_sd: float, seed: int) -> None:
    """Python's fractions know the mean and sd exactly. A one-pass variance errs by 2 % at sd / mean = 1e-7."""
    sd = 10**log_sd
    values = mean + sd * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    exact = [Fraction(v) for v in values[mask].tolist()]
    centre = sum(exact) / len(exact)
    spread = math.sqrt(sum((v - centre) ** 2 for v in exact) / len(exact))
    expected = torch.tensor([float(v - centre) / (spread + 1e-8) for v in exact], dtype=torch.float64)
    assert_close(whiten(values, mask)[mask], expected, rtol=1e-6, atol=1e-6)


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
    with pytest.raises(ValueError, match="lambda"):
        scalar_gae(rewards, values[..., 0], mask, z_end[:, 0], 1.0, torch.ones(3, 5))
