"""Fast quantile Huber against a chunked pairwise loop, forward + backward, in one run. Prints JSON.

OMP_NUM_THREADS=1 python tests/bench/bench_quantile_huber.py [--tokens 8192 --heads 3 --quantiles 200]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dvpo_service.algo.quantile_huber import quantile_huber
from dvpo_service.algo.quantiles import quantile_levels


def pairwise(z: Tensor, y: Tensor, tau: Tensor, delta: float) -> Tensor:
    """The textbook loss on [N, H, M, K] temporaries; returns [N, H, M]."""
    u = y[:, None, None, :] - z[..., None]
    weight = (tau[:, None] - (u < 0).to(z.dtype)).abs()
    return (weight * torch.nn.functional.huber_loss(u, torch.zeros_like(u), reduction="none", delta=delta)).mean(-1)


def chunked_pairwise(z: Tensor, y: Tensor, tau: Tensor, delta: float, rows: int) -> Tensor:
    """Sum of the loss with its gradient accumulated chunk by chunk, so that memory stays bounded."""
    total = torch.zeros(())
    for zs, ys in zip(z.split(rows), y.split(rows), strict=True):
        loss = pairwise(zs, ys, tau, delta).sum()
        loss.backward()
        total += loss.detach()
    return total


def fast(z: Tensor, y: Tensor, tau: Tensor, delta: float) -> Tensor:
    loss = quantile_huber(z, y, tau, delta).sum()
    loss.backward()
    return loss.detach()


def timed(call: Callable[[Tensor], Tensor], z: Tensor, repeats: int) -> tuple[float, Tensor, Tensor]:
    """Best seconds of ``repeats``, the loss and the gradient."""
    best = float("inf")
    for _ in range(repeats):
        leaf = z.clone().requires_grad_()
        start = time.perf_counter()
        loss = call(leaf)
        best = min(best, time.perf_counter() - start)
    assert leaf.grad is not None
    return best, loss, leaf.grad


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--quantiles", type=int, default=200)
    parser.add_argument("--delta", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    z = torch.randn(args.tokens, args.heads, args.quantiles).sort(-1).values
    y = torch.randn(args.tokens, args.quantiles)
    tau = quantile_levels(args.quantiles, "endpoint")

    t_fast, l_fast, g_fast = timed(partial(fast, y=y, tau=tau, delta=args.delta), z, args.repeats)
    # Small chunks are the pairwise loop's best case on a CPU: its temporaries stay in cache.
    candidates = {}
    for chunk in (4, 32, 256):
        candidates[chunk] = timed(partial(chunked_pairwise, y=y, tau=tau, delta=args.delta, rows=chunk), z, 1)
    rows, (t_pair, l_pair, g_pair) = min(candidates.items(), key=lambda item: item[1][0])
    print(
        json.dumps(
            {
                "tokens": args.tokens,
                "heads": args.heads,
                "quantiles": args.quantiles,
                "threads": torch.get_num_threads(),
                "fast_s": round(t_fast, 4),
                "pairwise_s": round(t_pair, 4),
                "pairwise_rows_per_chunk": rows,
                "speedup": round(t_pair / t_fast, 2),
                "loss_relative_difference": float((l_fast - l_pair).abs() / l_pair),
                "gradient_max_difference": float((g_fast - g_pair).abs().max()),
            }
        )
    )


if __name__ == "__main__":
    main()
