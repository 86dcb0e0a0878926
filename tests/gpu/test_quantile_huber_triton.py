"""The kernel on a real GPU against the torch path on the same GPU."""

from __future__ import annotations

import math

import pytest
import torch

from dvpo_service.algo.quantile_huber import _by_sorting
from dvpo_service.algo.quantile_huber_triton import losses_and_slopes
from dvpo_service.algo.quantiles import quantile_levels

pytestmark = pytest.mark.gpu(1)


@pytest.mark.parametrize("shape", [(257, 3, 200, 200), (33, 1, 500, 77), (5, 2, 1, 1), (64, 3, 30, 1)])
@pytest.mark.parametrize("delta", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_kernel_equals_torch_path(
    shape: tuple[int, int, int, int], delta: float, dtype: torch.dtype, tolerance: float
) -> None:
    n, h, m, k = shape
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(n, q, generator=generator, dtype=torch.float64) for q in (h * m, k))
    y = (y / torch.rand(n, k, generator=generator, dtype=torch.float64) + 100).to("cuda", dtype)
    z = (z + 100).to("cuda", dtype)
    z[:, 0] = y[:, 0]  # ties
    tau = quantile_levels(m, "midpoint", device=z.device, dtype=dtype)
    for unit in (False, True):
        fast, slow = losses_and_slopes(z, y, tau, delta, unit), _by_sorting(z, y, tau, delta, unit)
        for a, b in zip(fast, slow, strict=True):
            scale = 1.0 if unit or delta < 1 else delta
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def test_nan_stays_in_its_token() -> None:
    z, y = torch.randn(3, 8, device="cuda"), torch.randn(3, 6, device="cuda")
    y[1, 2] = math.nan
    losses, slopes = losses_and_slopes(z, y, quantile_levels(4, "midpoint"), 1.0, False)
    assert losses[1].isnan().all()
    assert slopes[1].isnan().all()
    assert losses[[0, 2]].isfinite().all()
