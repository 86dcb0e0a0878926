from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from algo_reference import calibrated_spec, paper_spec, reference_loss, robust_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo.critic_loss import critic_loss, shift_sum
from dvpo_service.algo.critic_terms import head_consistency, risk_weights, tail_curvature
from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec

FORMS = (paper_spec, calibrated_spec, robust_spec)


def batch(seed: int = 0, b: int = 3, t: int = 5, h: int = 2, m: int = 12, k: int = 9) -> tuple[Tensor, ...]:
    """Return z, y and mask, in float64; y is higher than z on average, so that Eq. 7 is not 0."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(b, t, h, m, generator=generator, dtype=torch.float64)
    y = torch.randn(b, t, k, generator=generator, dtype=torch.float64) + 0.3
    mask = torch.rand(b, t, generator=generator) < 0.7
    mask[0, 0] = True
    return z, y, mask


def grad_of(z: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
    z = z.clone().requires_grad_()
    loss = critic_loss(z, *args, **kwargs)
    (grad,) = torch.autograd.grad(loss.total, z)
    return loss, grad


@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 9)),
    st.floats(0.02, 1.0),
    st.floats(0.02, 1.0),
    st.fixed_dictionaries(
        {
            "risk_eta": st.floats(0, 5),
            "quantile_levels": st.sampled_from(("endpoint", "midpoint")),
            "huber_unit": st.booleans(),
            "sort_atoms": st.booleans(),
            "qr_over": st.sampled_from(("ensemble", "heads")),
            "tail_target": st.sampled_from(("tail_mean", "pseudo_outcome", "bounded")),
            "tail_spread": st.sampled_from(("variance", "bounded")),
            "shift_over": st.sampled_from(("token", "batch", "batch_middle")),
            "curvature": st.sampled_from(("pointwise", "block")),
        }
    ),
)
@settings(max_examples=120, deadline=None)
def test_against_the_independent_reference(
    seed: int, shape: tuple[int, int, int], alpha: float, beta: float, switches: dict[str, Any]
) -> None:
    h, m, k = shape
    z, y, mask = batch(seed, 2, 2, h, m, k)
    spec = paper_spec(alpha=alpha, beta=beta, **switches)
    loss = critic_loss(z, y, mask, spec, delta=0.3, width=0.4, denominator=float(mask.sum()))
    expected = reference_loss(z, y, mask, spec, 0.3, 0.4)
    for name in TERMS:
        assert loss.raw[name].item() == pytest.approx(expected[name], rel=1e-9, abs=1e-11), name
    assert loss.total.item() == pytest.approx(expected["total"], rel=1e-9)


@pytest.mark.parametrize("make_spec", [paper_spec, calibrated_spec])  # robust_spec stops gradients, too
def test_gradcheck(make_spec: Any) -> None:
    z, y, mask = batch(4, 1, 2, 2, 7, 5)
    spec = make_spec(alpha=0.5, beta=0.4, tail_target="tail_mean")  # pseudo_outcome stops a gradient on purpose
    assert torch.autograd.gradcheck(
        lambda x: critic_loss(x, y, mask, spec, delta=0.5, denominator=2.0).total, (z.requires_grad_(),)
    )


@pytest.mark.parametrize("make_spec", FORMS)
@pytest.mark.parametrize("offset", [0.0, -5.0])  # with -5 the relu of the batch-wide Eq. 7 is 0
def test_micro_batches_add_up(make_spec: Any, offset: float) -> None:
    z, y, mask = batch(1)
    y = y + offset
    spec, count = make_spec(), float(mask.sum())
    whole, whole_grad = grad_of(z, y, mask, spec, delta=0.1, denominator=count)
    shift = float(sum(shift_sum(z[i : i + 1], y[i : i + 1], mask[i : i + 1], spec) for i in range(3))) / count
    assert (shift > 0) == (offset == 0)
    parts = [
        grad_of(
            z[i : i + 1],
            y[i : i + 1],
            mask[i : i + 1],
            spec,
            delta=0.1,
            denominator=torch.tensor(count),
            mean_shift=shift,
        )
        for i in range(3)
    ]
    assert_close(torch.cat([grad for _, grad in parts]), whole_grad, rtol=1e-12, atol=1e-15)
    assert_close(sum(p.total for p, _ in parts), whole.total, rtol=1e-12, atol=1e-15)
    for name in TERMS:
        for report in ("raw", "weighted"):
            total = sum(getattr(p, report)[name] for p, _ in parts)
            assert_close(total, getattr(whole, report)[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make_spec", FORMS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_padding_reaches_neither_value_nor_gradient(make_spec: Any, junk: float) -> None:
    z, y, mask = batch(2)
    clean, clean_grad = grad_of(z, y, mask, make_spec(), delta=0.1, denominator=10.0)
    z[~mask], y[~mask] = junk, junk
    dirty, dirty_grad = grad_of(z, y, mask, make_spec(), delta=0.1, denominator=10.0)
    assert torch.equal(clean.total, dirty.total)
    assert torch.equal(clean_grad, dirty_grad)
    assert (dirty_grad[~mask] == 0).all()
    assert shift_sum(z, y, mask).isfinite()


@pytest.mark.parametrize("make_spec", FORMS)
@pytest.mark.parametrize("name", TERMS)
def test_ablation_removes_exactly_one_term(make_spec: Any, name: str) -> None:
    z, y, mask = batch(3)
    full = make_spec()
    ablated = replace(full, weights={**full.weights, name: 0.0})
    alone = replace(full, weights=dict.fromkeys(TERMS, 0.0) | {name: full.weights[name]})
    whole, g_whole = grad_of(z, y, mask, full, delta=0.1, denominator=10.0)
    without, g_without = grad_of(z, y, mask, ablated, delta=0.1, denominator=10.0)
    only, g_only = grad_of(z, y, mask, alone, delta=0.1, denominator=10.0)
    assert_close(g_without + g_only, g_whole, rtol=1e-12, atol=1e-15)
    assert_close(without.total + only.total, whole.total)
    assert all(torch.equal(without.raw[x], whole.raw[x]) for x in TERMS)  # still measured
    assert without.weighted[name] == 0
    assert not any(x.requires_grad for x in (*whole.raw.values(), *whole.weighted.values()))
    assert_close(torch.stack(list(whole.weighted.values())).sum(), whole.total.detach())


def test_an_ablated_nan_does_not_reach_the_gradient() -> None:
    z, y, mask = batch(5)
    z = z * 1e200  # squares overflow: the gradients of Eq. 5, 6, 8 and 10 would be infinite or NaN
    weights = dict.fromkeys(TERMS, 0.0) | {"qr": 1.0}
    loss, grad = grad_of(z, y, mask, paper_spec(weights=weights), delta=1.0, denominator=10.0)
    assert not loss.raw["shape"].isfinite()
    assert loss.total.isfinite()
    assert grad.isfinite().all()


def test_everything_ablated_or_masked_still_has_a_gradient_of_zero() -> None:
    z, y, mask = batch(6)
    loss, grad = grad_of(z, y, mask, paper_spec(weights=dict.fromkeys(TERMS, 0.0)), delta=1.0, denominator=1)
    assert loss.total == 0
    assert (grad == 0).all()
    loss, grad = grad_of(z, y, torch.zeros_like(mask), calibrated_spec(), delta=1.0, denominator=7)
    assert loss.total == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("make_spec", FORMS)
@pytest.mark.parametrize(("h", "m", "k"), [(1, 1, 1), (1, 2, 1), (2, 1, 3), (1, 8, 8)])
@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_degenerate_shapes_are_finite(make_spec: Any, h: int, m: int, k: int, fraction: float) -> None:
    z, y, mask = batch(7, h=h, m=m, k=k)
    spec = make_spec(alpha=fraction, beta=fraction)
    loss, grad = grad_of(z, y, mask, spec, delta=0.1, denominator=float(mask.sum()))
    assert grad.isfinite().all()
    assert all(x.isfinite() for x in loss.raw.values())


def test_bf16_is_computed_in_float32_and_float64_stays() -> None:
    z, y, mask = batch(8)
    half = z.bfloat16()
    expected = critic_loss(half.float(), y.float(), mask, paper_spec(), delta=1.0, denominator=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad = grad_of(half, y.float(), mask, paper_spec(), delta=1.0, denominator=10)
    assert loss.total.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    assert torch.equal(loss.total.detach(), expected.total.detach())
    assert critic_loss(z, y, mask, paper_spec(), delta=1.0, denominator=10).total.dtype == torch.float64


def test_a_nan_mean_shift_is_not_taken_for_closed() -> None:
    z, y, mask = batch(9)
    y[0, 0, 0] = math.nan
    loss = critic_loss(z, y, mask, calibrated_spec(), delta=1.0, denominator=9, mean_shift=math.nan)
    assert loss.raw["shift"].isnan()


def test_calibrated_tails_and_shift_are_unbiased_under_sampled_targets() -> None:
    """At the true quantiles, with single draws as targets, the gradients of Eq. 5 and 6 average to 0."""
    m, n = 40, 40_000
    levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    z = normal.icdf(levels).expand(1, n, 1, m)
    y = torch.randn(1, n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = dict.fromkeys(TERMS, 0.0) | {"cvar": 1.0, "gain": 1.0}
    mask = torch.ones(1, n, dtype=torch.bool)
    push = {}
    for form in ("tail_mean", "pseudo_outcome"):
        spec = paper_spec(alpha=0.2, beta=0.2, tail_target=form, weights=weights)
        push[form] = grad_of(z, y, mask, spec, delta=1.0, denominator=n)[1].sum((0, 1, 2)).abs().max().item()
    assert push["pseudo_outcome"] < 0.1 * push["tail_mean"]


def test_terms_by_hand() -> None:
    weights = risk_weights(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64), 1.0)
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights.diff() < 0).all()
    assert torch.equal(risk_weights(torch.tensor([0.2, 0.9]), 0.0), torch.ones(2))
    heads = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    assert head_consistency(heads).item() == pytest.approx((4 + 1 + 1) / 3 / 2)
    long_lower_tail = torch.tensor([-10.0, -5.0, -3.0, -2.0, -1.5, -1.4])
    for kind in ("pointwise", "block"):
        assert tail_curvature(long_lower_tail, 0.5, 0.01, kind) > 0  # contracted
        assert tail_curvature(-long_lower_tail.flip(-1), 0.01, 0.5, kind) == 0  # a long upper tail costs nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"beta": 1.5}, "beta"),
        ({"weights": {"qr": 1.0}}, "exactly"),
        ({"weights": dict.fromkeys(TERMS, -1.0)}, ">= 0"),
        ({"weights": dict.fromkeys(TERMS, math.nan)}, "finite"),
    ],
)
def test_bad_spec(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paper_spec(**changes)


def test_bad_input() -> None:
    z, y, mask = batch(10)
    spec: CriticLossSpec = paper_spec()
    with pytest.raises(ValueError, match="expected z"):
        critic_loss(z, y[:, 1:], mask, spec, delta=1.0, denominator=1)
    with pytest.raises(ValueError, match="denominator"):
        critic_loss(z, y, mask, spec, delta=1.0, denominator=0)
    with pytest.raises(ValueError, match="delta"):
        critic_loss(z, y, mask, spec, delta=0.0, denominator=1)
    with pytest.raises(ValueError, match="width"):
        critic_loss(z, y, mask, spec, delta=1.0, width=0.0, denominator=1)
