from __future__ import annotations

import math
import os

import pytest
import torch
from algo_reference import quantile_huber_naive
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dvpo_service.algo import quantile_huber as module
from dvpo_service.algo.quantile_huber import quantile_huber
from dvpo_service.algo.quantiles import quantile_levels

KINDS = ("normal", "ties", "heavy", "point", "clusters")


def draw(kind: str, generator: torch.Generator, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return (2 * x).round() / 2
    if kind == "heavy":
        return x / torch.randn(shape, generator=generator, dtype=torch.float64).abs().clamp(min=1e-5)
    if kind == "point":
        return torch.full_like(x, 0.3)
    if kind == "clusters":
        return (5 * x).round() * 1000 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return x


def agree(z: Tensor, y: Tensor, tau: Tensor, delta: float, unit: bool, tolerance: float) -> None:
    """Assert that values and gradients agree with the naive ones.

    The tolerance is relative to what they would be without the factor |tau - 1|, because the loss of a top atom may be
    nearly 0 while its targets are far away.
    """
    z = z.clone().requires_grad_()
    loss = quantile_huber(z, y, tau, delta, unit)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    exact = quantile_huber_naive(z.detach().double(), y.double(), tau.double(), delta, unit)
    assert ((loss - exact.loss).abs() <= tolerance * exact.untilted_loss + 1e-38).all()
    assert ((grad - exact.slope).abs() <= tolerance * exact.untilted_slope + 1e-38).all()


@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 25), st.integers(1, 40)),
    st.sampled_from((0.0, -3.0, 100.0, 1e4)),
    st.floats(-6, 6),
    st.booleans(),
    st.sampled_from((torch.float64, torch.float32)),
)
@settings(max_examples=300, deadline=None)
def test_fast_equals_pairwise(
    kind: str,
    seed: int,
    shape: tuple[int, int, int, int],
    offset: float,
    log_delta: float,
    unit: bool,
    dtype: torch.dtype,
) -> None:
    n, h, m, k = shape
    generator = torch.Generator().manual_seed(seed)
    z = (draw("normal" if kind == "point" else kind, generator, n, h, m) + offset).to(dtype)
    y = (draw(kind, generator, n, k) + offset).to(dtype)
    z[0, 0, 0] = y[0, 0]  # an atom on a target
    tau = quantile_levels(m, "endpoint" if seed % 2 else "midpoint", dtype=dtype)
    agree(z, y, tau, 10**log_delta, unit, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("delta", [1e-3, 0.05, 1.0, 50.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_equals_pairwise_at_size(kind: str, delta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    z, y = draw(kind, generator, 4, 3, 200) + 1e4, draw(kind, generator, 4, 200) + 1e4
    agree(z, y, quantile_levels(200, "endpoint", dtype=torch.float64), delta, False, 1e-12)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_gradcheck(k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    z, y = draw("normal", generator, 2, 2, 5).requires_grad_(), draw("normal", generator, 2, k)
    tau = quantile_levels(5, "midpoint", dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: quantile_huber(x, y, tau, 0.7), (z,))


def test_by_hand() -> None:
    z, y = torch.tensor([[[0.0]]], requires_grad=True), torch.tensor([[3.0, -0.5]])
    loss = quantile_huber(z, y, torch.tensor([0.25]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx((0.25 * 2.5 + 0.75 * 0.125) / 2)
    assert z.grad is not None
    assert z.grad.item() == pytest.approx((-0.25 * 1.0 + 0.75 * 0.5) / 2)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    z, y = draw("heavy", generator, 3, 7, 2, 6), draw("heavy", generator, 3, 7, 9)
    tau = quantile_levels(6, "endpoint", dtype=torch.float64)
    whole = quantile_huber(z, y, tau, 0.5)
    monkeypatch.setitem(module._CHUNK_ATOMS, "cpu", 1)
    assert torch.equal(whole, quantile_huber(z, y, tau, 0.5))


def test_order_of_targets_and_their_gradient() -> None:
    z = torch.randn(2, 1, 4, requires_grad=True)
    y, tau = torch.randn(2, 5, requires_grad=True), quantile_levels(4, "endpoint")
    loss = quantile_huber(z, y, tau, 1.0)
    assert_close(loss, quantile_huber(z, y.flip(-1), tau, 1.0))
    loss.sum().backward()
    assert y.grad is None


def test_bf16_and_autocast_work_in_float32() -> None:
    z, y, tau = torch.randn(4, 2, 50), torch.randn(4, 50), quantile_levels(50, "midpoint")
    exact = quantile_huber(z, y, tau, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantile_huber(z, y, tau, 0.1), exact)
    half = z.bfloat16().requires_grad_()
    loss = quantile_huber(half, y, tau, 0.1)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, quantile_huber(half.detach().float(), y, tau, 0.1))
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_nan_stays_in_its_token() -> None:
    z, y = torch.randn(3, 2, 4), torch.randn(3, 6)
    y[1, 2] = math.nan
    z[2, 0, 3] = math.nan
    loss = quantile_huber(z, y, quantile_levels(4, "midpoint"), 1.0)
    assert loss[1].isnan().all()
    assert loss[2].isnan().sum() == 1
    assert loss[0].isfinite().all()
    assert loss[2, 0, 3].isnan()


def test_float64_targets_of_float32_atoms() -> None:
    z, y, tau = torch.randn(3, 2, 4), torch.randn(3, 6, dtype=torch.float64), quantile_levels(4, "midpoint")
    assert_close(quantile_huber(z, y, tau, 1.0), quantile_huber(z.double(), y, tau, 1.0).float())


def test_path() -> None:
    """On a CPU the kernel is used only in Triton's interpreter, and only where float32 can represent delta."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert (module._kernel_for(torch.zeros(1), 1.0) is not None) == interpreted
    assert module._kernel_for(torch.zeros(1), 1e-50) is None


def test_empty_batch() -> None:
    assert quantile_huber(torch.zeros(0, 2, 4), torch.zeros(0, 3), torch.ones(4), 1.0).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("z", "y", "levels", "delta"),
    [
        ((2, 1, 4), (3, 4), 4, 1.0),
        ((2, 1, 4), (2, 4), 3, 1.0),
        ((2, 1, 4), (2, 0), 4, 1.0),
        ((2, 1, 4), (2, 4), 4, 0.0),
        ((2, 1, 4), (2, 4), 4, math.nan),
    ],
)
def test_bad_input(z: tuple[int, ...], y: tuple[int, ...], levels: int, delta: float) -> None:
    with pytest.raises(ValueError, match=r"atoms|levels|atom|delta"):
        quantile_huber(torch.zeros(z), torch.zeros(y), torch.ones(levels), delta)
