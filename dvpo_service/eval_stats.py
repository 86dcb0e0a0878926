"""Statistics of an evaluation: n scored samples of each prompt, and a greedy one. Pure functions."""

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
    """Rewards without noise of one prompt's samples; what could not be scored is counted in ``failed``."""

    split: str
    source: str
    samples: tuple[float, ...]
    greedy: float | None
    failed: int = 0


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of k samples is right, without bias, when ``right`` of n were: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), eq. 1. Raises ValueError unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {right} of them right, is not defined")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def ks(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def summarize(prompts: Sequence[PromptScores], n: int) -> dict[str, Any]:
    """The figures of a group of prompts that were sampled n times each, ready for JSON; None where not defined.

    ``accuracy`` is the mean over prompts of a prompt's mean reward; prompts are what is drawn independently, so
    ``standard_error`` and the 95% interval ``ci95`` (Student's t) are over prompts. ``sd_within_prompt`` is the
    spread of one prompt's samples, pooled. pass@k is over prompts with at least k scored samples.
    """
    means = [fmean(p.samples) for p in prompts if p.samples]
    greedy = [p.greedy for p in prompts if p.greedy is not None]
    spreads = [variance(p.samples) for p in prompts if len(p.samples) > 1]
    return {
        "prompts": len(prompts),
        "samples": sum(len(p.samples) for p in prompts),
        "failed": sum(p.failed for p in prompts),
        "accuracy": _mean(means),
        "standard_error": _standard_error(means),
        "ci95": _interval(means),
        "sd_within_prompt": math.sqrt(fmean(spreads)) if spreads else None,
        "greedy": _mean(greedy),
        "greedy_standard_error": _standard_error(greedy),
        "pass_at_k": {str(k): _mean(_passes(prompts, k)) for k in ks(n)},
    }


def by_group(prompts: Iterable[PromptScores], n: int) -> dict[str, Any]:
    """``summarize`` by split and by data source (``Prompt.source``, over all splits)."""
    prompts = list(prompts)
    return {
        "splits": {name: summarize([p for p in prompts if p.split == name], n) for name in _names(prompts, "split")},
        "sources": {name: summarize([p for p in prompts if p.source == name], n) for name in _names(prompts, "source")},
    }


def _names(prompts: Sequence[PromptScores], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(p, field) for p in prompts))


def _passes(prompts: Sequence[PromptScores], k: int) -> list[float]:
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
