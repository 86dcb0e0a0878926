"""Measurements of critic and policy as *sums* that add up over micro-batches and ranks.

``*_sums`` returns float64 scalars; add them key by key (or all-reduce them), then ``*_metrics`` turns the
totals into named numbers. So a metric cannot depend on how a batch was split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, masked_sum, zero_masked
from dvpo_service.algo.policy_loss import MAX_LOG_RATIO
from dvpo_service.algo.quantiles import crossing_count, lower_tail_mean, upper_tail_mean

COVERAGE_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


@torch.no_grad()
def critic_sums(
    z: Tensor, returns: Tensor, mask: Tensor, levels: Tensor, alpha: float, beta: float
) -> dict[str, Tensor]:
    """Sufficient sums of the critic's metrics.

    Args:
      z: predicted atoms [B, T, H, M] as the critic gives them; sorted here, after counting crossings.
      returns: scalar returns [B, T].
      mask: [B, T] bool; what stands where it is False is never read.
      levels: tau [M] of the atoms.
      alpha, beta: the tails' fractions.

    Returns:
      float64 scalars: "count", "pairs", "crossings", "value", "return", "return_sq", "error", "error_sq",
      "disagreement", "lower_tail", "upper_tail" and "covered/<level>". Additive.
    """
    heads = zero_masked(float32_or_better(z), mask).sort(-1).values
    returns = zero_masked(float32_or_better(returns), mask)
    q = heads.mean(-2)
    value = q.mean(-1)
    error = returns.double() - value.double()
    count = mask.sum().double()
    per_token = {
        "value": value,
        "return": returns,
        "return_sq": returns.double().square(),
        "error": error,
        "error_sq": error.square(),
        "disagreement": heads.mean(-1).std(-1, correction=0),
        "lower_tail": lower_tail_mean(q, alpha),
        "upper_tail": upper_tail_mean(q, beta),
    }
    for level in COVERAGE_LEVELS:
        per_token[f"covered/{level}"] = returns <= _quantile(q, levels, level)
    sums = {name: masked_sum(x.double(), mask) for name, x in per_token.items()}
    pairs = count * (z.shape[-2] * (z.shape[-1] - 1))
    return {"count": count, "pairs": pairs, "crossings": crossing_count(z, mask), **sums}


def critic_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Named metrics from summed ``critic_sums``. With no valid token: NaN.

    ``explained_variance`` = 1 - Var(return - value) / Var(return), NaN when all returns are equal;
    ``coverage/p`` is the share of returns at or below the predicted p-quantile: p when calibrated (for
    continuous returns); ``head_disagreement`` the mean population sd over heads of the heads' means.
    """
    s = {name: float(x) for name, x in sums.items()}
    n = s["count"]

    def variance(name: str) -> float:
        return max(_ratio(s[f"{name}_sq"], n) - _ratio(s[name], n) ** 2, 0.0) if n else math.nan

    metrics = {
        "critic/quantile_mean": _ratio(s["value"], n),
        "critic/explained_variance": 1.0 - _ratio(variance("error"), variance("return")),
        "critic/crossing_rate": _ratio(s["crossings"], s["pairs"]) if s["pairs"] or not n else 0.0,
        "critic/head_disagreement": _ratio(s["disagreement"], n),
        "critic/lower_tail_mean": _ratio(s["lower_tail"], n),
        "critic/upper_tail_mean": _ratio(s["upper_tail"], n),
    }
    return metrics | {f"critic/coverage/{p}": _ratio(s[f"covered/{p}"], n) for p in COVERAGE_LEVELS}


@torch.no_grad()
def rollout_kl_sums(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums for KL(rollout engine || trainer) and the sample size that its importance weights leave.

    Both log-probs [B, T] are of the tokens that the engine sampled. Ratios are clamped at exp(+-20).
    """
    log_ratio = zero_masked(logprobs.double() - rollout_logprobs.double(), mask)
    weight = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    per_token = {
        "k1": -log_ratio,
        "k3": weight - 1.0 - log_ratio,
        "weight": weight,
        "weight_sq": weight.square(),
    }
    return {"count": mask.sum().double(), **{name: masked_sum(x, mask) for name, x in per_token.items()}}


def rollout_kl_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """``policy/rollout_kl`` (k3: never negative), ``policy/rollout_kl_k1`` (unbiased too, any sign) and
    ``policy/rollout_ess`` = (sum w)^2 / (n sum w^2) in (0, 1]. With no valid token: NaN.
    """
    s = {name: float(x) for name, x in sums.items()}
    return {
        "policy/rollout_kl": _ratio(s["k3"], s["count"]),
        "policy/rollout_kl_k1": _ratio(s["k1"], s["count"]),
        "policy/rollout_ess": _ratio(s["weight"] ** 2, s["count"] * s["weight_sq"]),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _quantile(q: Tensor, levels: Tensor, level: float) -> Tensor:
    """The ``level``-quantile of the atoms, linear between their levels, flat beyond: [..., M] -> [...]."""
    grid = levels.double().cpu()
    right = int(torch.searchsorted(grid, torch.tensor(level, dtype=torch.float64)))
    if right == 0 or right == grid.numel():
        return q[..., min(right, grid.numel() - 1)]
    share = float((level - grid[right - 1]) / (grid[right] - grid[right - 1]))
    return torch.lerp(q[..., right - 1], q[..., right], share)
