"""What a sweep's trials measured: numbers from their metrics and summaries, and which trials count.

Accuracies are shares (0.5 is 50 points). No number here is NaN: what was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from tune_sweeps.records import Sweep, Trial

LATE = 0.2  # "late" is the last fifth of a run's updates


@dataclass(frozen=True)
class Column:
    """A column of the report: held-out splits whose mean accuracy is one number."""

    key: Literal["in", "ood"]
    label: str
    splits: tuple[str, ...]


def accuracy(trial: Trial, column: Column, name: str) -> float | None:
    """Return the mean of ``summary[name]`` over the column's splits, or None if a split is missing."""
    by_split = trial.summary.get(name) or {}
    values = [number(by_split.get(split)) for split in column.splits]
    return None if None in values else mean(values)


def series(trial: Trial, name: str) -> list[tuple[int, float]]:
    """Return (step, value) for the steps in which the metric was measured and is finite."""
    points = [(row["step"], number(row.get(name))) for row in trial.metrics]
    return [(step, value) for step, value in points if value is not None]


def evaluations(trial: Trial, column: Column) -> list[tuple[int, float]]:
    """Return (step, sampled accuracy) for the evaluations in which every split of the column has an accuracy."""
    points = [(row["step"], [number(row.get(f"eval/{s}/accuracy")) for s in column.splits]) for row in trial.metrics]
    return [(step, fmean(v for v in values if v is not None)) for step, values in points if None not in values]


def late(trial: Trial, points: Sequence[tuple[int, float]]) -> float | None:
    """Return the mean of (step, value) points over the last fifth of the trial's updates."""
    return between(trial, points, 1 - LATE, 1.0)


def between(trial: Trial, points: Sequence[tuple[int, float]], start: float, end: float) -> float | None:
    """Return the mean of (step, value) points over a part of the trial's updates.

    Args:
      start, end: the part as shares of all updates; ``start`` is exclusive and ``end`` inclusive.
    """
    last = trial.metrics[-1]["step"] if trial.metrics else 0
    return mean(value for step, value in points if start * last < step <= end * last)


def mean(values: Any) -> float | None:
    """Return the mean of the values that are not None, or None if there are none."""
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def number(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number, and None otherwise."""
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if finite else None


def trials_of(sweep: Sweep, arm: str | None) -> list[Trial]:
    """Return the trials of an arm, whatever their status."""
    return [t for t in sweep.trials if t.state.arm == arm]


def finished(sweep: Sweep, arm: str | None) -> list[Trial]:
    """Return the trials of an arm that have finished: the only ones that enter a mean."""
    return [t for t in trials_of(sweep, arm) if t.state.status == "done"]


def values_by_seed(sweep: Sweep, arm: str | None, value: Callable[[Trial], float | None]) -> dict[int, float]:
    """Return ``value`` of an arm's finished trials by seed, without the seeds for which it is None."""
    values = {t.state.seed: value(t) for t in finished(sweep, arm)}
    return {seed: v for seed, v in values.items() if v is not None}
