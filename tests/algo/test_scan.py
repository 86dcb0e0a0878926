from __future__ import annotations

import math

import pytest
import torch
from algo_reference import reference_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dvpo_service.algo.scan import CHUNK, LastFirst, linear_scan


@given(st.integers(0, 2**31), st.integers(1, 3 * CHUNK), st.sampled_from((0.0, 0.3, 0.95, 1.0)))
@settings(max_examples=40, deadline=None)
def test_against_one_step_after_another(seed: int, steps: int, most: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(2, steps, generator=generator, dtype=torch.float64)
    c = most * torch.rand(2, steps, generator=generator, dtype=torch.float64)
    c[torch.rand(2, steps, generator=generator) < 0.1] = 0
    start = torch.randn(2, generator=generator, dtype=torch.float64)
    before = b.clone(), c.clone()
    x = linear_scan(b, c, start)
    for row in range(2):
        expected = reference_scan(b[row].tolist(), c[row].tolist(), start[row].item())
        assert_close(x[row], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(b, before[0])
    assert torch.equal(c, before[1])


@pytest.mark.parametrize("wide", [True, False], ids=["coefficient-per-atom", "shared-coefficient"])
def test_trailing_axes(wide: bool) -> None:
    b, start = torch.randn(2, 150, 3), torch.randn(2, 3)
    c = torch.rand(2, 150, 3 if wide else 1)
    x = linear_scan(b, c, start)
    for j in range(3):
        assert_close(x[..., j], linear_scan(b[..., j], c[..., j if wide else 0], start[:, j]))


@pytest.mark.parametrize("steps", [1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 4096])
def test_counts_exactly(steps: int) -> None:
    """With c = 1, b = 1 and start 0 every x is an integer, however the chunks divide the steps."""
    x = linear_scan(torch.ones(1, steps), torch.ones(1, steps), torch.zeros(1))
    assert torch.equal(x[0], torch.arange(1.0, steps + 1))


@pytest.mark.parametrize("c", [1e-30, 0.5, 0.9999])
def test_long_products_underflow_to_what_they_are(c: float) -> None:
    args = torch.ones(1, 4096), torch.full((1, 4096), c), torch.full((1,), 7.0)
    exact = linear_scan(*(x.double() for x in args))
    assert_close(linear_scan(*args).double(), exact, rtol=2e-5, atol=0)


def test_a_step_never_reaches_an_earlier_one() -> None:
    b, c, start = torch.randn(1, 200), torch.rand(1, 200), torch.zeros(1)
    clean = linear_scan(b, c, start)
    for x in (b, c):
        x[0, 70] = math.nan
    spoiled = linear_scan(b, c, start)
    assert torch.equal(spoiled[:, :70], clean[:, :70])
    assert spoiled[:, 70:].isnan().all()
    assert torch.equal(linear_scan(b[:, :70], c[:, :70], start), clean[:, :70])  # the length does not matter either


@pytest.mark.parametrize(("b", "t"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(b: int, t: int) -> None:
    order = LastFirst(torch.ones(b, t, dtype=torch.bool))
    x = torch.zeros(b, t, 4)
    following = order.pack_following(x, torch.zeros(b, 4))
    assert order.unpack(linear_scan(following, order.pack(x), torch.zeros(b, 4))).shape == (b, t, 4)


def test_last_first() -> None:
    mask = torch.tensor([[False, True, True, False, True, False], [False] * 6, [True] * 6])
    x = torch.arange(18.0).view(3, 6)
    order = LastFirst(mask)
    assert order.pack(x)[0, :3].tolist() == [4, 2, 1]
    assert order.pack(x)[2].tolist() == [17, 16, 15, 14, 13, 12]
    assert order.pack_following(x, torch.tensor([-1.0, -2.0, -3.0]))[0, :3].tolist() == [-1, 4, 2]
    assert order.unpack(order.pack(x)).tolist() == torch.where(mask, x, 0).tolist()
