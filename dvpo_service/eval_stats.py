"""Statistics of an evaluation with n scored samples and a greedy response per prompt. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance
from typing import Any

from scipy.stats import norm as normal
from scipy.stats import t as student

LEVEL = 0.95  # of intervals
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
    - ``standard_error`` and ``ci95``, the 95% interval: over prompts, because only prompts are drawn independently.
      ``ci95_method`` says which it is, see ``accuracy_interval``.
    - ``sd_within_prompt``: the standard deviation of a prompt's samples, pooled over prompts.
    - ``pass_at_k``: the mean of pass@k over prompts with at least k scored samples.
    """
    means = [fmean(p.samples) for p in prompts if p.samples]
    greedy = [p.greedy for p in prompts if p.greedy is not None]
    spreads = [variance(p.samples) for p in prompts if len(p.samples) > 1]
    interval, method = accuracy_interval([p.samples for p in prompts if p.samples])
    return {
        "prompts": len(prompts),
        "samples": sum(len(p.samples) for p in prompts),
        "failed": sum(p.failed for p in prompts),
        "graded": any(reward not in (0.0, 1.0) for p in prompts for reward in p.samples),
        "accuracy": _mean(means),
        "standard_error": _standard_error(means),
        "ci95": interval,
        "ci95_method": method,
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


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Return Student's t interval of the mean of independent values; None for fewer than two.

    It is exact for normal values: with three of them the mean is known to 2.5 standard deviations of a value.
    """
    error = _standard_error(values)
    if error is None:
        return None
    half = float(student.ppf(0.5 + level / 2, len(values) - 1)) * error
    return fmean(values) - half, fmean(values) + half


def accuracy_interval(samples: Sequence[Sequence[float]]) -> tuple[list[float] | None, str | None]:
    """Return the 95% interval of an accuracy and its name; (None, None) where it is not defined.

    - ``wilson``, where every reward is 0 or 1: Wilson's score interval. A prompt's samples are alike, so that they
      count for less than as many independent ones: the number is p (1 - p) over the variance of the mean over prompts
      (Kish's effective sample size). It is defined for one prompt, and where all are right. With 30 to 300 prompts it
      covers 85 to 98 %, least for a few wrong ones whose samples are alike; Student's t covers 25 to 96 % there.
    - ``student_t``, for graded rewards: over the prompts' means, cut to 0 and 1 where no reward is beyond them.

    Args:
      samples: the rewards of each prompt's samples; no prompt is empty.
    """
    means = [fmean(s) for s in samples]
    every = [reward for s in samples for reward in s]
    if every and set(every) <= {0.0, 1.0}:
        return list(_wilson(means, len(every))), "wilson"
    found = mean_interval(means)
    if found is None:
        return None, None
    if min(every) >= 0 and max(every) <= 1:
        return [max(0.0, found[0]), min(1.0, found[1])], "student_t"
    return list(found), "student_t"


def _wilson(means: Sequence[float], samples: int) -> tuple[float, float]:
    p = fmean(means)
    between = fmean((m - p) ** 2 for m in means)
    n: float = samples if 0 < p < 1 else len(means)  # all right or all wrong: how alike samples are cannot be seen
    if between:
        n = min(n, len(means) * p * (1 - p) / between)
    z = float(normal.ppf(0.5 + LEVEL / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
