"""Statistics of an evaluation with n scored samples and a greedy response per prompt. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

from scipy.stats import t as student

RIGHT = 0.5  # a sample counts as right for pass@k when its reward is at least this


@dataclass(frozen=True)
class PromptScores:
    """The rewards of one prompt's samples, without noise.

    Attributes:
      split: the evaluation split.
      source: the data source, ``Prompt.source``.
      samples: rewards of the samples that could be scored.
      greedy: reward of the greedy response; None if there is none or it could not be scored.
      failed: number of samples that could not be scored.
    """

    split: str
    source: str
    samples: tuple[float, ...]
    greedy: float | None
    failed: int = 0


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k samples is right.

    With c = ``right`` of n samples right it is 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, Eq. 1).
    Raises ValueError unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {right} of them right, is not defined")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """Return the k at which pass@k is reported: 1, 2, 4, ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def summarize(prompts: Sequence[PromptScores], n: int) -> dict[str, Any]:
    """Return the figures of a group of prompts with n samples each, ready for JSON; None where a figure is not defined.

    - ``accuracy``: the mean over prompts of a prompt's mean reward.
    - ``graded``: whether a reward is neither 0 nor 1, so that the accuracy is a mean of grades.
    - ``standard_error`` and ``ci95``, the 95% interval (Student's t): over prompts, because only prompts are drawn
      independently.
    - ``sd_within_prompt``: the standard deviation of a prompt's samples, pooled over prompts.
    - ``pass_at_k``: the mean of pass@k over prompts with at least k scored samples.
    """
    means = [fmean(p.samples) for p in prompts if p.samples]
    greedy = [p.greedy for p in prompts if p.greedy is not None]
    spreads = [variance(p.samples) for p in prompts if len(p.samples) > 1]
    return {
        "prompts": len(prompts),
        "samples": sum(len(p.samples) for p in prompts),
        "failed": sum(p.failed for p in prompts),
        "graded": any(reward not in (0.0, 1.0) for p in prompts for reward in p.samples),
        "accuracy": _mean(means),
        "standard_error": _standard_error(means),
        "ci95": _interval(means),
        "sd_within_prompt": math.sqrt(fmean(spreads)) if spreads else None,
        "greedy": _mean(greedy),
        "greedy_standard_error": _standard_error(greedy),
        "pass_at_k": {str(k): _mean(_pass_rates(prompts, k)) for k in ks(n)},
    }


def by_group(prompts: Iterable[PromptScores], n: int) -> dict[str, Any]:
    """Return ``summarize`` for each split, and for each data source over all splits."""
    prompts = list(prompts)
    return {
        "splits": {name: summarize([p for p in prompts if p.split == name], n) for name in _names(prompts, "split")},
        "sources": {name: summarize([p for p in prompts if p.source == name], n) for name in _names(prompts, "source")},
    }


def _names(prompts: Sequence[PromptScores], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(p, field) for p in prompts))


def _pass_rates(prompts: Sequence[PromptScores], k: int) -> list[float]:
    return [
        pass_at_k(len(p.samples), sum(score >= RIGHT for score in p.samples), k) for p in prompts if len(p.samples) >= k
    ]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _interval(values: Sequence[float]) -> list[float] | None:
    error = _standard_error(values)
    if error is None:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return [fmean(values) - half, fmean(values) + half]
