"""Measurements of critic and policy as *sums* that add up over micro-batches and ranks.

``*_sums`` returns float64 scalars; add them key by key (or all-reduce them), then ``*_metrics`` turns the
totals into named numbers. So a metric cannot depend on how a batch was split.
``between_groups`` takes a whole batch, before it is split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, masked_sum, zero_masked
from dvpo_service.algo.policy_loss import MAX_LOG_RATIO, kl_penalty
from dvpo_service.algo.quantiles import crossing_count, lower_tail_mean, upper_tail_mean

COVERAGE_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


@torch.no_grad()
def critic_sums(
    z: Tensor, returns: Tensor, mask: Tensor, levels: Tensor, alpha: float, beta: float, tolerance: float = 0.0
) -> dict[str, Tensor]:
    """Sufficient sums of the critic's metrics.

    Args:
      z: predicted atoms [B, T, H, M] as the critic gives them; sorted here, after counting crossings.
      returns: scalar returns [B, T].
      mask: [B, T] bool; what stands where it is False is never read.
      levels: tau [M] of the atoms.
      alpha, beta: the tails' fractions.
      tolerance: a return so near to a predicted quantile is equal to it, in the returns' units.

    Returns:
      float64 scalars: "count", "value", "return", "return_sq", "error", "error_sq"; with M > 1 "pairs",
      "crossings", "lower_tail", "upper_tail", "covered/<level>" and "below/<level>"; with M > 1 and H > 1
      "disagreement". Additive. (One atom is a scalar critic: it has no quantiles, and its coverage would mean nothing.)
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
    }
    sums = {"count": count}
    num_heads, num_atoms = z.shape[-2:]
    if num_atoms > 1:
        per_token |= {"lower_tail": lower_tail_mean(q, alpha), "upper_tail": upper_tail_mean(q, beta)}
        at = {p: _quantile(q, levels, p) for p in COVERAGE_LEVELS}
        per_token |= {f"covered/{p}": returns <= x + tolerance for p, x in at.items()}
        per_token |= {f"below/{p}": returns < x - tolerance for p, x in at.items()}
        sums |= {"pairs": count * (num_heads * (num_atoms - 1)), "crossings": crossing_count(z, mask)}
        if num_heads > 1:
            per_token["disagreement"] = heads.mean(-1).std(-1, correction=0)
    return sums | {name: masked_sum(x.double(), mask) for name, x in per_token.items()}


def critic_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Named metrics from summed ``critic_sums``. With no valid token: NaN.

    ``explained_variance`` = 1 - Var(return - value) / Var(return), NaN when all returns are equal;
    ``return_mean``, ``return_sd`` are of the scalar returns, per token. With more than one atom also:
    ``crossing_rate``, the share of neighbouring atoms out of order before sorting (atoms that the loss sorts
    have no order to learn: 0.5 is what heads start with and may keep); ``coverage/p``, the share of returns at or
    below the predicted p-quantile: p when calibrated, more where returns are equal to it; ``calibration_error``,
    the mean over the levels of p's distance to [share below, share at or below], which is 0 for the right
    quantiles of any law, of 0/1 rewards too; the tails' means; and with more than one head ``head_disagreement``, the
    mean population sd over heads of the heads' means.
    """
    s = {name: float(x) for name, x in sums.items()}
    n = s["count"]

    def variance(name: str) -> float:
        return max(_ratio(s[f"{name}_sq"], n) - _ratio(s[name], n) ** 2, 0.0) if n else math.nan

    metrics = {
        "critic/quantile_mean": _ratio(s["value"], n),
        "critic/return_mean": _ratio(s["return"], n),
        "critic/return_sd": math.sqrt(variance("return")),
        "critic/explained_variance": 1.0 - _ratio(variance("error"), variance("return")),
    }
    if "pairs" in s:
        coverage = {p: _ratio(s[f"covered/{p}"], n) for p in COVERAGE_LEVELS}
        metrics |= {
            "critic/crossing_rate": _ratio(s["crossings"], s["pairs"]),
            "critic/lower_tail_mean": _ratio(s["lower_tail"], n),
            "critic/upper_tail_mean": _ratio(s["upper_tail"], n),
            "critic/calibration_error": sum(
                max(_ratio(s[f"below/{p}"], n) - p, p - seen, 0.0) for p, seen in coverage.items()
            )
            / len(coverage),
        }
        metrics |= {f"critic/coverage/{p}": seen for p, seen in coverage.items()}
    if "disagreement" in s:
        metrics["critic/head_disagreement"] = _ratio(s["disagreement"], n)
    return metrics


@torch.no_grad()
def policy_sums(
    logprobs: Tensor,
    old_logprobs: Tensor,
    clipped: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums for how far an update has moved the policy, r = p / p_old.

    Args:
      logprobs, old_logprobs: [B, T] of the sampled tokens, now and before the update.
      clipped: [B, T] bool from ``clipped_surrogate``.
      mask: [B, T] bool; what stands where it is False is never read.
      ref_logprobs: [B, T] under the reference policy, if there is one.
      entropy: [B, T] of the policy's distributions in nats, if it is at hand.

    Returns:
      float64 scalars: "count", "clipped", "kl", "ratio", "ratio_sq", and "ref_kl", "entropy" where given. Additive.
      (No greatest ratio: a maximum is no sum. ``ratio_ess`` sees one runaway token as well.)
    """
    logprobs = zero_masked(logprobs.double(), mask)
    log_ratio = logprobs - zero_masked(old_logprobs.double(), mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    per_token = {
        "clipped": clipped.double(),
        "kl": ratio - 1.0 - log_ratio,
        "ratio": ratio,
        "ratio_sq": ratio.square(),
    }
    if ref_logprobs is not None:
        per_token["ref_kl"] = kl_penalty(logprobs, zero_masked(ref_logprobs.double(), mask), "k3")
    if entropy is not None:
        per_token["entropy"] = entropy.double()
    return {"count": mask.sum().double(), **{name: masked_sum(x, mask) for name, x in per_token.items()}}


def policy_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """``policy/clip_fraction``; ``policy/approx_kl`` = mean(r - 1 - log r), which for tokens that p_old sampled
    estimates KL(p_old || p) without bias and is never negative (k3; Schulman 2020); ``policy/ratio_ess`` =
    (sum r)^2 / (n sum r^2) in (0, 1]; ``policy/ref_kl`` (k3 of KL(p || reference)) and ``policy/entropy`` where
    they were summed. With no valid token: NaN.
    """
    s = {name: float(x) for name, x in sums.items()}
    metrics = {
        "policy/clip_fraction": _ratio(s["clipped"], s["count"]),
        "policy/approx_kl": _ratio(s["kl"], s["count"]),
        "policy/ratio_ess": _ratio(s["ratio"] ** 2, s["count"] * s["ratio_sq"]),
    }
    return metrics | {f"policy/{k}": _ratio(s[k], s["count"]) for k in ("ref_kl", "entropy") if k in s}


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


def between_groups(scores: Tensor) -> float:
    """The share of the scores' variance that lies between groups, of ``scores`` [groups, samples].

    The one-way intraclass correlation, ICC(1) of Shrout and Fleiss (1979), of the groups without a failed (NaN) score:
    what a critic that reads no more than the prompt can explain at best. Unbiased in numerator and denominator, so an
    estimate below 0 means about 0. NaN for fewer than two groups or samples, and where all scores are equal.
    """
    whole = scores[~scores.isnan().any(1)].double()
    count, size = whole.shape
    if min(count, size) < 2:
        return math.nan
    between, within = size * whole.mean(1).var(), whole.var(1).mean()
    return float((between - within) / (between + (size - 1) * within))
