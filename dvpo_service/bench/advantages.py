"""Time of targets and advantages on one CPU thread.

The chunked scan is compared with the loop over T that it replaced, which exists only in this module. Both sides are
timed with all of their work, checks, coins and sort included. DVPO's advantages are compared with each other: ``huber``
against ``mean``, in the critic's whole estimate.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dvpo_service.algo.advantages import distributional_gae, mixture_targets, scalar_gae
from dvpo_service.algo.huber_advantage import huber_advantages
from dvpo_service.algo.masks import zero_masked
from dvpo_service.bench.critic_step import STATS, random_rollouts
from dvpo_service.config import AlgorithmConfig, CriticConfig
from dvpo_service.estimators.base import critic_objective

B, T, M = 4, 4096, 200
GAMMA, LAM = 0.999, 0.95
REPEATS = 5


def run() -> dict[str, Any]:
    """Return, for each function, the median milliseconds of loop and scan and their ratio, ready for JSON.

    Loop and scan run in alternation. The measurement takes seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shape = {"shape": {"B": B, "T": T, "M": M}, "repeats": REPEATS, "threads": 1}
        return shape | _measure() | {"advantage": advantage(B * 2048)}
    finally:
        torch.set_num_threads(threads)


def advantage(tokens: int) -> dict[str, Any]:
    """Return the microseconds a token of the critic's estimate with each advantage, and of the Huber advantage alone.

    An estimate sorts the heads, builds the critic's targets (calibrated form) and computes the advantages. The times
    are CPU seconds, the best of the repeats, which run in alternation.
    """
    part = random_rollouts(sequences=4, prompt=4, response=tokens // 4)
    z = torch.randn(4, tokens // 4, 3, M, generator=torch.Generator().manual_seed(0))
    atoms, mask, seeds = z.mean(-2), part.response_mask, torch.arange(4)

    def estimate(advantage: str) -> Callable[[], object]:
        config = AlgorithmConfig.model_validate({"form": "calibrated", "advantage": advantage})
        objective = critic_objective(config, CriticConfig())
        return lambda: objective.estimate(z, z[:, 0], part, seeds=seeds, pretraining=False, stats=STATS)

    work = {
        "mean": estimate("mean"),
        "huber": estimate("huber"),
        "huber_alone": lambda: huber_advantages(atoms, z[:, :, 0], mask, 1.0),
    }
    laps = [{name: _cpu_seconds(call) for name, call in work.items()} for _ in range(REPEATS)]
    best = {name: min(lap[name] for lap in laps) for name in work}
    micro = {f"{name}_us": round(1e6 * seconds / tokens, 2) for name, seconds in best.items()}
    return {"tokens": tokens, "heads": 3, "quantiles": M} | micro | {"ratio": round(best["huber"] / best["mean"], 2)}


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _measure() -> dict[str, Any]:
    rewards, values, mask, z_end, seeds = _batch()
    gae = rewards, values, mask, z_end, GAMMA, LAM
    scalar = rewards, values.mean(-1), mask, z_end.mean(-1), GAMMA, LAM
    targets = distributional_gae(*gae)
    loop_targets = _loop_gae(*gae)
    return {
        "distributional_gae": _compare(lambda: _loop_gae(*gae), lambda: distributional_gae(*gae)),
        "mixture_targets": _compare(lambda: _loop_mixture(*gae, seeds), lambda: mixture_targets(*gae, seeds)),
        "scalar_gae": _compare(lambda: _loop_scalar(*scalar), lambda: scalar_gae(*scalar)),
        "largest_difference": (targets - loop_targets).abs().max().item(),
        "largest_target": targets.abs().max().item(),
    }


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return answers of different lengths, with a tool call inside and the outcome on the last valid token."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(B, T, M, generator=generator).sort(-1).values
    length = torch.tensor([T, T - 1, 3 * T // 4, T // 2])
    mask = torch.arange(T) < length[:, None]
    mask[:, T // 8 : T // 7] = False
    rewards = torch.zeros(B, T)
    rewards[torch.arange(B), length - 1] = 1.0
    return rewards, values, mask, torch.zeros(B, M), torch.arange(B)


def _compare(loop: Callable[[], object], scan: Callable[[], object]) -> dict[str, float]:
    # Warm up.
    loop()
    scan()
    pairs = [(_milliseconds(loop), _milliseconds(scan)) for _ in range(REPEATS)]
    loops, scans = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"loop_ms": round(loops, 2), "scan_ms": round(scans, 2), "ratio": round(loops / scans, 1)}


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _loop_gae(rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float) -> Tensor:
    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)
    next_value, next_advantage = end, torch.zeros_like(end)
    advantages = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        valid = mask[:, t, None]
        delta = rewards[:, t, None] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(valid, advantage, 0.0)
        next_advantage = torch.where(valid, advantage, next_advantage)
        next_value = torch.where(valid, values[:, t], next_value)
    return zero_masked(values + advantages, mask)


def _loop_scalar(rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float) -> Tensor:
    return _loop_gae(rewards, values.unsqueeze(-1), mask, end.unsqueeze(-1), gamma, lam).squeeze(-1)


def _loop_mixture(
    rewards: Tensor, values: Tensor, mask: Tensor, end: Tensor, gamma: float, lam: float, seeds: Tensor
) -> Tensor:
    rewards, values = zero_masked(rewards, mask), zero_masked(values, mask)
    coins = torch.zeros(values.shape, dtype=torch.bool)
    for row, seed in enumerate(seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        coins[row, mask[row]] = torch.rand(int(mask[row].sum()), values.shape[-1], generator=generator) < lam
    next_value = next_target = end
    targets = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        valid = mask[:, t, None]
        target = rewards[:, t, None] + gamma * torch.where(coins[:, t], next_target, next_value)
        targets[:, t] = torch.where(valid, target, 0.0)
        next_target = torch.where(valid, target, next_target)
        next_value = torch.where(valid, values[:, t], next_value)
    return targets.sort(-1).values


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
