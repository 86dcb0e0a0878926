"""Measurements of critic and policy as *sums* that add up over micro-batches and ranks.

The functions ``*_sums`` return float64 scalars. Add them key by key (or all-reduce them); the functions ``*_metrics``
then turn the totals into named numbers. So a metric cannot depend on how a batch was split. ``between_groups`` takes a
whole batch, before it is split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dvpo_service.algo.masks import float32_or_better, masked_sum, zero_masked
from dvpo_service.algo.policy_loss import MAX_LOG_RATIO, kl_penalty
from dvpo_service.algo.quantiles import crossing_count, interpolate_quantiles, lower_tail_mean, upper_tail_mean

COVERAGE_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


@torch.no_grad()
def critic_sums(
    z: Tensor,
    returns: Tensor,
    mask: Tensor,
    levels: Tensor,
    alpha: float,
    beta: float,
    tolerance: float = 0.0,
    centre: float = 0.0,
) -> dict[str, Tensor]:
    """Return the sums from which ``critic_metrics`` computes the critic's metrics.

    Args:
      z: predicted atoms [B, T, H, M] as the critic outputs them. This function sorts them; crossings are counted in the
        unsorted atoms.
      returns: scalar returns [B, T].
      mask: [B, T] bool; values where it is False are never read.
      levels: quantile levels tau [M] of the atoms.
      alpha, beta: fractions of the lower and upper tail.
      centre: subtracted from the returns in the sums "return" and "return_sq", so that little is left to cancel in
        their variance: any of the returns, the same for all parts of a batch and for ``critic_metrics``.
      tolerance: how close to a predicted quantile a return counts as equal to it, in the units of the returns.

    Returns:
      Additive float64 scalars: "count", "value", "return", "return_sq", "error" and "error_sq"; with M > 1 also
      "pairs", "crossings", "lower_tail", "upper_tail", "covered/<level>" and "below/<level>"; with M > 1 and H > 1 also
      "disagreement". (A critic with one atom is scalar: it has no quantiles, and its coverage would mean nothing.)
    """
    heads = zero_masked(float32_or_better(z), mask).sort(-1).values
    returns = zero_masked(float32_or_better(returns), mask)
    q = heads.mean(-2)
    value = q.mean(-1)
    error = returns.double() - value.double()
    count = mask.sum().double()
    per_token = {
        "value": value,
        "return": returns.double() - centre,
        "return_sq": (returns.double() - centre).square(),
        "error": error,
        "error_sq": error.square(),
    }
    sums = {"count": count}
    num_heads, num_atoms = z.shape[-2:]
    if num_atoms > 1:
        per_token |= {"lower_tail": lower_tail_mean(q, alpha), "upper_tail": upper_tail_mean(q, beta)}
        # In float64, the precision of the coverage levels.
        wanted = torch.tensor(COVERAGE_LEVELS, dtype=torch.float64)
        predicted = interpolate_quantiles(q, levels.double().cpu(), wanted).unbind(-1)
        at = dict(zip(COVERAGE_LEVELS, predicted, strict=True))
        per_token |= {f"covered/{p}": returns <= x + tolerance for p, x in at.items()}
        per_token |= {f"below/{p}": returns < x - tolerance for p, x in at.items()}
        sums |= {"pairs": count * (num_heads * (num_atoms - 1)), "crossings": crossing_count(z, mask)}
        if num_heads > 1:
            per_token["disagreement"] = heads.mean(-1).std(-1, correction=0)
    return sums | {name: masked_sum(x.double(), mask) for name, x in per_token.items()}


def critic_metrics(sums: Mapping[str, Tensor], centre: float = 0.0) -> dict[str, float]:
    """Return the metrics ``critic/<name>`` from summed ``critic_sums``; they are NaN when no token is valid.

    ``centre`` is the one that the sums were taken with.

    - ``quantile_mean``: the mean value. ``return_mean`` and ``return_sd`` are of the scalar returns, per token.
    - ``explained_variance``: 1 - Var(return - value) / Var(return); NaN when all returns are equal.

    With more than one atom also:

    - ``crossing_rate``: the share of neighbouring atoms that are out of order before sorting. Where the loss sorts the
      atoms they have no order to learn: heads start at 0.5 and may stay there.
    - ``coverage/p``: the share of returns at or below the predicted p-quantile. It is p for a calibrated critic, and
      more where returns are equal to the quantile.
    - ``calibration_error``: the distance of p to the interval [share below, share at or below], averaged over the
      levels p. It is 0 for the right quantiles of any distribution, 0/1 rewards included.
    - ``lower_tail_mean`` and ``upper_tail_mean``.
    - ``head_disagreement``, with more than one head: the population sd over heads of the heads' means, averaged over
      tokens.
    """
    s = {name: float(x) for name, x in sums.items()}
    n = s["count"]

    def variance(name: str) -> float:
        return max(_ratio(s[f"{name}_sq"], n) - _ratio(s[name], n) ** 2, 0.0) if n else math.nan

    metrics = {
        "critic/quantile_mean": _ratio(s["value"], n),
        "critic/return_mean": centre + _ratio(s["return"], n),
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
    """Return sums that measure how far an update has moved the policy; r = p / p_old.

    Args:
      logprobs, old_logprobs: [B, T] of the sampled tokens, now and before the update.
      clipped: [B, T] bool, where the policy loss was clipped.
      mask: [B, T] bool; values where it is False are never read.
      ref_logprobs: [B, T] under the reference policy, if there is one.
      entropy: [B, T] of the policy's distributions, in nats, if it was computed.

    Returns:
      Additive float64 scalars: "count", "clipped", "kl", "ratio" and "ratio_sq", and "ref_kl" and "entropy" where their
      inputs are given. (The largest ratio is not among them, because a maximum is not a sum. ``ratio_ess`` shows a
      single runaway token as well.)
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
    """Return the metrics from summed ``policy_sums``; they are NaN when no token is valid.

    - ``policy/clip_fraction``.
    - ``policy/approx_kl``: mean(r - 1 - log r). For tokens that p_old sampled it estimates KL(p_old || p) without bias,
      and it is never negative (k3; Schulman 2020).
    - ``policy/ratio_ess``: the effective sample size (sum r)^2 / (n sum r^2), in (0, 1].
    - ``policy/ref_kl`` (the k3 estimate of KL(p || reference)) and ``policy/entropy``, where they were summed.
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
    """Return sums for KL(rollout engine || trainer) and for the effective sample size of the importance weights.

    Args:
      logprobs, rollout_logprobs: [B, T] of the tokens that the engine sampled, by the trainer and by the engine. Their
        ratios are clamped to exp(+-20).
      mask: [B, T] bool; values where it is False are never read.

    Returns:
      Additive float64 scalars: "count", "k1", "k3", "weight" and "weight_sq".
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
    """Return the metrics from summed ``rollout_kl_sums``; they are NaN when no token is valid.

    - ``policy/rollout_kl``: the k3 estimate of the KL, unbiased and never negative.
    - ``policy/rollout_kl_k1``: the k1 estimate, unbiased too, of any sign.
    - ``policy/rollout_ess``: the effective sample size (sum w)^2 / (n sum w^2), in (0, 1].
    """
    s = {name: float(x) for name, x in sums.items()}
    return {
        "policy/rollout_kl": _ratio(s["k3"], s["count"]),
        "policy/rollout_kl_k1": _ratio(s["k1"], s["count"]),
        "policy/rollout_ess": _ratio(s["weight"] ** 2, s["count"] * s["weight_sq"]),
    }


def merged_moments(moments: Tensor, sums: Mapping[str, Tensor], centre: float) -> Tensor:
    """Return (count, mean, sum of squared deviations), [3] float64, of earlier returns and of a batch's.

    The pairwise update of Chan, Golub and LeVeque (1983): nothing cancels, and equal returns leave exactly 0.

    Args:
      moments: of the earlier returns; zeros before the first batch.
      sums: of the whole batch, from ``critic_sums`` with ``centre``.
    """
    n, total, squares = (float(sums[name]) for name in ("count", "return", "return_sq"))
    before, mean, spread = moments.tolist()
    if not n:
        return moments
    gap = centre + total / n - mean if before else 0.0
    count = before + n
    spread += max(squares - total**2 / n, 0.0) + gap**2 * before * n / count
    mean = mean + gap * n / count if before else centre + total / n
    return torch.tensor([count, mean, spread], dtype=torch.float64)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def between_groups(scores: Tensor) -> float:
    """Return the share of the scores' variance that lies between groups, from ``scores`` [groups, samples].

    It is the one-way intraclass correlation, ICC(1) of Shrout and Fleiss (1979), of the groups without a failed (NaN)
    score. No critic that reads only the prompt can explain a larger share. The estimates in numerator and denominator
    are unbiased, so a result below 0 means about 0. The result is NaN for fewer than two groups or samples, and where
    all scores are equal.
    """
    complete = scores[~scores.isnan().any(1)].double()
    count, size = complete.shape
    if min(count, size) < 2:
        return math.nan
    complete = complete - complete[0, 0]  # so that equal scores leave no rounding to divide by
    between = size * complete.mean(1).var()
    within = complete.var(1).mean()
    return _ratio(float(between - within), float(between + (size - 1) * within))
