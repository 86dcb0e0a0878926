"""The cost of the exact quantile-Huber loss: time against a pairwise loop, memory, growth, and the GPU kernel.

``python -m dvpo_service.bench.quantile_huber`` prints the figures of ``run`` as JSON in about half a minute.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dvpo_service.algo.quantile_huber import _by_sorting, _kernel_for, quantile_huber
from dvpo_service.algo.quantiles import quantile_levels

HEADS, DELTA = 3, 1.0
MIB = 2**20


def run() -> dict[str, Any]:
    """Return every figure, ready for JSON.

    CPU times are CPU seconds of one thread, so that other load on the machine matters little.
    """
    with _one_thread():
        return {
            "torch": torch.__version__,
            "cpu": platform.processor() or platform.machine(),
            "heads": HEADS,
            "delta": DELTA,
            "timing": "forward and backward, best of the repeats, CPU seconds of one thread",
            "speedup": [speedup(200, 8192, pairwise_tokens=512), speedup(500, 8192, pairwise_tokens=64)],
            "memory": memory(8192, 200),
            "growth_with_tokens": growth([(2048, 200), (8192, 200)], axis=0),
            "growth_with_quantiles": growth([(2048, 100), (2048, 200), (2048, 400)], axis=1),
            "cuda": kernel(65536, 200, torch.device("cuda")) if torch.cuda.is_available() else None,
        }


def speedup(quantiles: int, tokens: int, pairwise_tokens: int) -> dict[str, Any]:
    """Compare the fast path on ``tokens`` tokens with a chunked pairwise loop.

    The loop runs on the first ``pairwise_tokens`` tokens, and its time is scaled. It is timed with several chunk sizes,
    and the fastest counts: small chunks keep its temporaries in cache.
    """
    z, y, tau = _inputs(tokens, quantiles)
    fast_s, gradient = _timed(partial(fast, y=y, tau=tau), z, repeats=3)
    few_z, few_y = z[:pairwise_tokens], y[:pairwise_tokens]
    trials = {
        rows: _timed(partial(pairwise_loop, y=few_y, tau=tau, rows=rows), few_z, repeats=3) for rows in (1, 4, 16, 64)
    }
    rows, (pairwise_s, exact) = min(trials.items(), key=lambda trial: trial[1][0])
    scaled_s = pairwise_s * tokens / pairwise_tokens
    return {
        "quantiles": quantiles,
        "tokens": tokens,
        "fast_s": round(fast_s, 4),
        "pairwise_s": round(scaled_s, 3),
        "pairwise_note": f"measured on {pairwise_tokens} tokens in chunks of {rows}, scaled to {tokens}",
        "speedup": round(scaled_s / fast_s, 1),
        "gradient_max_difference": float((gradient[:pairwise_tokens] - exact).abs().max()),
    }


def pairwise_loop(z: Tensor, y: Tensor, tau: Tensor, rows: int) -> None:
    """Compute the textbook loss with [rows, H, M, K] temporaries and add up its gradient chunk by chunk."""
    for z_part, y_part in zip(z.split(rows), y.split(rows), strict=True):
        u = y_part[:, None, None, :] - z_part[..., None]
        weight = (tau[:, None] - (u < 0).to(z.dtype)).abs()
        huber = torch.nn.functional.huber_loss(u, torch.zeros_like(u), reduction="none", delta=DELTA)
        (weight * huber).mean(-1).sum().backward()


def fast(z: Tensor, y: Tensor, tau: Tensor) -> None:
    """Compute loss and gradient with ``quantile_huber``."""
    quantile_huber(z, y, tau, DELTA).sum().backward()


def memory(tokens: int, quantiles: int) -> dict[str, Any]:
    """Measure the peak resident memory that forward and backward add in a fresh process.

    Losses and gradient are included.
    """
    command = [sys.executable, "-m", "dvpo_service.bench.quantile_huber", "--peak", str(tokens), str(quantiles)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    extra = int(process.stdout)
    table = tokens * HEADS * quantiles * quantiles * 4
    return {
        "quantiles": quantiles,
        "tokens": tokens,
        "extra_mib": round(extra / MIB, 1),
        "of_which_results_mib": round(3 * tokens * HEADS * quantiles * 4 / MIB, 1),  # losses, slopes, gradient
        "pairwise_table_mib": round(table / MIB, 1),
        "share_of_the_table": round(extra / table, 4),
    }


def peak_in_this_process(tokens: int, quantiles: int) -> int:
    """Return by how many bytes one call's peak exceeds the resident memory of this process before the call."""
    torch.set_num_threads(1)
    z, y, tau = _inputs(tokens, quantiles)
    leaf = z.requires_grad_()
    fast(z[:1].detach().requires_grad_(), y[:1], tau)  # so that libraries loaded on first use do not count
    before = _status("VmRSS")
    fast(leaf, y, tau)
    return _status("VmHWM") - before


def growth(sizes: list[tuple[int, int]], axis: int) -> dict[str, Any]:
    """Measure the seconds for each (tokens, quantiles), and the growth exponent along one axis.

    Args:
      sizes: at least two pairs, ascending along ``axis``.
      axis: 0 for growth with tokens, 1 for growth with quantiles. The exponent is between the first and the last size;
        1 is linear.
    """
    seconds = {}
    for size in sizes:
        z, y, tau = _inputs(*size)
        seconds[size[axis]] = _timed(partial(fast, y=y, tau=tau), z, repeats=5)[0]
    (low, low_s), *_, (high, high_s) = seconds.items()
    return {
        "seconds": {str(n): round(s, 4) for n, s in seconds.items()},
        "exponent": round(math.log(high_s / low_s) / math.log(high / low), 2),
    }


def kernel(tokens: int, quantiles: int, device: torch.device) -> dict[str, Any]:
    """Compare the Triton kernel with the torch path, and with the time that its HBM traffic alone takes."""
    z, y, tau = (x.to(device) for x in _inputs(tokens, quantiles))
    z = z.flatten(1)
    fused = _kernel_for(z, DELTA)
    if fused is None:
        return {"note": "Triton is not installed"}
    # The kernel reads z and y and writes losses and slopes. A copy reads and writes each byte, so half as many bytes
    # make the same traffic.
    traffic = 4 * (3 * z.numel() + y.numel())
    source = torch.empty(traffic // 2, dtype=torch.uint8, device=device)
    floor_s = _median_seconds(lambda: source.clone())
    kernel_s = _median_seconds(lambda: fused(z, y, tau, DELTA, False))
    torch_s = _median_seconds(lambda: _by_sorting(z, y, tau, DELTA, False))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "tokens": tokens,
        "quantiles": quantiles,
        "kernel_ms": round(kernel_s * 1e3, 3),
        "torch_path_ms": round(torch_s * 1e3, 3),
        "speedup": round(torch_s / kernel_s, 1),
        "traffic_mib": round(traffic / MIB, 1),
        "traffic_floor_ms": round(floor_s * 1e3, 3),
        "kernel_over_floor": round(kernel_s / floor_s, 1),
        "pairs_per_s": round(z.numel() * y.shape[1] / kernel_s),
    }


def _inputs(tokens: int, quantiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sorted atoms [N, H, M], unsorted targets [N, K] and levels [M]."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(tokens, HEADS, quantiles, generator=generator).sort(-1).values
    return z, torch.randn(tokens, quantiles, generator=generator), quantile_levels(quantiles, "endpoint")


def _timed(call: Callable[[Tensor], None], z: Tensor, repeats: int) -> tuple[float, Tensor]:
    """Return the CPU seconds of the fastest repeat, and the gradient."""
    best, gradient = math.inf, z
    for _ in range(repeats):
        leaf = z.clone().requires_grad_()
        start = time.process_time()
        call(leaf)
        best = min(best, time.process_time() - start)
        assert leaf.grad is not None
        gradient = leaf.grad
    return best, gradient


def _median_seconds(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call on a device, including the wait for the device."""
    from torch.utils.benchmark import Timer

    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.3).median


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes. Unlike getrusage, VmHWM does not include the parent process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_in_this_process(int(sys.argv[2]), int(sys.argv[3])))
    else:
        print(json.dumps(run(), indent=2))
