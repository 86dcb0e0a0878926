"""From a sweep's records to what can be said of it: paired changes, spread, and whether the seeds can tell.

Accuracies are shares (0.5 is 50 points). Only finished trials enter a mean; the others are counted. Nothing here
is NaN: what was not measured is None.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from scipy.stats import bootstrap

from tune_sweeps.records import Sweep, Trial

Verdict = Literal["higher", "lower", "the seeds cannot tell"]
UNSURE: Verdict = "the seeds cannot tell"
MIN_PAIRS = 3  # with fewer there is no interval
LEVEL = 0.95
RESAMPLES = 9999
FELL, PEAKED = 0.02, 0.05  # what counts as a collapse, in accuracy
LATE = 0.2  # "late" is the last fifth of a run's updates
_HELD_OUT = re.compile(r"hold[_-]?out|held[_-]?out")
_WARNING = re.compile(r"\[([^\]]+)\]")


@dataclass(frozen=True)
class Column:
    """Held-out splits that are read as one number, their mean."""

    key: Literal["in", "ood"]
    label: str
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """An arm minus the reference, paired by seed; in the measure's own unit."""

    arm: str
    measure: str
    by_seed: dict[int, float]  # the pairs
    arm_mean: float | None  # over the paired seeds, as is reference_mean
    reference_mean: float | None
    mean: float | None
    low: float | None  # bootstrap interval of the mean
    high: float | None
    verdict: Verdict
    reason: str  # in words, why that verdict


@dataclass(frozen=True)
class Level:
    """An arm's finished trials in one column. ``by_seed`` is the sampled accuracy after training."""

    by_seed: dict[int, float]
    before: float | None
    after: float | None
    change: float | None  # after - before, over seeds that have both
    greedy_before: float | None
    greedy_after: float | None
    sd: float | None  # of ``after`` over seeds, n - 1 in the denominator
    worst: float | None
    worst_seed: int | None


@dataclass(frozen=True)
class ArmResult:
    """``collapsed``: seed to the reason. ``skipped_steps``, ``warnings``: summed over trials, unfinished ones too."""

    name: str
    removes: str | None
    overrides: dict[str, Any]
    status: dict[str, int]  # done, failed, unfinished, not begun
    levels: dict[str, Level]  # by column key
    collapsed: dict[int, str]
    skipped_steps: int
    warnings: dict[str, int]


@dataclass(frozen=True)
class Analysis:
    """``reference`` is None where the grid has none, or where its arm does not exist."""

    reference: str | None
    columns: list[Column]
    arms: list[ArmResult]
    accuracy: list[Comparison]  # measure: the column's key; arms in the grid's order, columns within
    greedy: list[Comparison]

    def comparison(self, arm: str, column: str, greedy: bool = False) -> Comparison | None:
        found = self.greedy if greedy else self.accuracy
        return next((c for c in found if (c.arm, c.measure) == (arm, column)), None)


def analyse(sweep: Sweep) -> Analysis:
    """All but the loss terms, which guide.py looks at."""
    columns = find_columns(sweep)
    reference = sweep.grid.reference if any(a.name == sweep.grid.reference for a in sweep.grid.arms) else None
    results = [_arm_result(sweep, arm.name, columns) for arm in sweep.grid.arms]
    others = [arm.name for arm in sweep.grid.arms if reference and arm.name != reference]

    def against(name: str) -> list[Comparison]:
        return [
            compare(sweep, arm, reference, column.key, partial(accuracy, column=column, name=name))
            for arm in others
            for column in columns
        ]

    return Analysis(reference, columns, results, against("held_out_after"), against("held_out_greedy_after"))


def find_columns(sweep: Sweep) -> list[Column]:
    """In distribution and out of it. A single split is one column under its own name."""
    splits = dict.fromkeys(s for t in sweep.trials for s in t.summary.get("held_out_after") or {})
    if not splits:  # nothing has finished: the evaluations say what there will be
        names = dict.fromkeys(name for t in sweep.trials for row in t.metrics for name in row)
        splits = dict.fromkeys(n.split("/")[1] for n in names if re.fullmatch(r"eval/[^/]+/accuracy", n))
    if len(splits) == 1:
        (only,) = splits
        return [Column("in", f"held out ({only})", (only,))]
    out = tuple(s for s in splits if "ood" in s.lower())
    out = out or tuple(s for s in splits if "out" in _HELD_OUT.sub("", s.lower()))
    inside = tuple(s for s in splits if s not in out)
    columns = []
    if inside:
        columns.append(Column("in", f"in distribution ({', '.join(inside)})", inside))
    if out:
        columns.append(Column("ood", f"out of distribution ({', '.join(out)})", out))
    return columns


def compare(
    sweep: Sweep, arm: str, reference: str | None, measure: str, value: Callable[[Trial], float | None]
) -> Comparison:
    """``value`` is asked of finished trials only."""
    ours, theirs = _by_seed(sweep, arm, value), _by_seed(sweep, reference, value)
    seeds = [seed for seed in ours if seed in theirs]
    by_seed = {seed: ours[seed] - theirs[seed] for seed in seeds}
    low, high = interval(list(by_seed.values()))
    verdict, reason = judge(list(by_seed.values()), low, high)
    of_arm, of_reference = mean(ours[s] for s in seeds), mean(theirs[s] for s in seeds)
    middle = mean(by_seed.values())
    return Comparison(arm, measure, by_seed, of_arm, of_reference, middle, low, high, verdict, reason)


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Percentile bootstrap of their mean at LEVEL: (low, high), (None, None) for fewer than MIN_PAIRS.

    Not BCa: its acceleration, estimated from three to five seeds, is noise, and equal differences make it NaN.
    """
    if len(differences) < MIN_PAIRS:
        return None, None
    how = {"confidence_level": LEVEL, "n_resamples": RESAMPLES, "method": "percentile"}
    found = bootstrap((np.asarray(differences),), np.mean, **how, rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def judge(differences: Sequence[float], low: float | None, high: float | None) -> tuple[Verdict, str]:
    """A direction only where every seed and the interval point the same way."""
    n = len(differences)
    if low is None or high is None:
        return UNSURE, f"{n} {'pair' if n == 1 else 'pairs'} of seeds; an interval needs {MIN_PAIRS}"
    if not any(differences):
        return UNSURE, "no difference at all"
    if not (all(d > 0 for d in differences) or all(d < 0 for d in differences)):
        return UNSURE, "the seeds do not agree on the sign"
    if low <= 0 <= high:
        return UNSURE, "the interval contains 0"
    return ("higher" if low > 0 else "lower"), f"all {n} seeds agree"


def by_chance(comparisons: Sequence[Comparison]) -> float:
    """How many of them would get a direction if no arm differed from the reference at all.

    A direction needs n equal signs, which n coins show with probability 2^(1-n); with equal signs a percentile
    interval never contains 0. So this is the rule's own rate, 1 in 4 with three seeds, and not LEVEL's 1 in 20.
    """
    return math.fsum(2.0 ** (1 - len(c.by_seed)) for c in comparisons if c.low is not None)


def accuracy(trial: Trial, column: Column, name: str) -> float | None:
    """Mean over the column's splits of ``summary[name]``; None where one of them is missing."""
    by_split = trial.summary.get(name) or {}
    values = [number(by_split.get(split)) for split in column.splits]
    return None if None in values else mean(values)


def series(trial: Trial, name: str) -> list[tuple[int, float]]:
    """(step, value) where the metric was measured and finite."""
    return [(row["step"], value) for row in trial.metrics if (value := number(row.get(name))) is not None]


def evaluations(trial: Trial, column: Column) -> list[tuple[int, float]]:
    """(step, sampled accuracy) at the evaluations in which every split of the column has one."""
    found = [(r["step"], [number(r.get(f"eval/{s}/accuracy")) for s in column.splits]) for r in trial.metrics]
    return [(step, fmean(v for v in values if v is not None)) for step, values in found if None not in values]


def late(trial: Trial, points: Sequence[tuple[int, float]]) -> float | None:
    """Mean of (step, value) points over the last fifth of the trial's updates."""
    return between(trial, points, 1 - LATE, 1.0)


def between(trial: Trial, points: Sequence[tuple[int, float]], start: float, end: float) -> float | None:
    """The same from the share ``start`` (exclusive) to the share ``end`` of the trial's updates."""
    last = trial.metrics[-1]["step"] if trial.metrics else 0
    return mean(value for step, value in points if start * last < step <= end * last)


def mean(values: Any) -> float | None:
    found = [v for v in values if v is not None]
    return fmean(found) if found else None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def trials_of(sweep: Sweep, arm: str | None) -> list[Trial]:
    return [t for t in sweep.trials if t.state.arm == arm]


def finished(sweep: Sweep, arm: str | None) -> list[Trial]:
    return [t for t in trials_of(sweep, arm) if t.state.status == "done"]


def _by_seed(sweep: Sweep, arm: str | None, value: Callable[[Trial], float | None]) -> dict[int, float]:
    found = {t.state.seed: value(t) for t in finished(sweep, arm)}
    return {seed: v for seed, v in found.items() if v is not None}


def _arm_result(sweep: Sweep, name: str, columns: list[Column]) -> ArmResult:
    arm = next(a for a in sweep.grid.arms if a.name == name)
    trials = trials_of(sweep, name)
    seen = Counter(t.state.status for t in trials)
    # A searched space has no fixed list of trials to wait for.
    missing = 0 if sweep.grid.space else len(set(sweep.seeds) - {t.state.seed for t in trials})
    status = {"done": seen["done"], "failed": seen["failed"], "unfinished": seen["waiting"] + seen["running"]}
    skipped = (v for t in trials for kind in ("policy", "critic") for _, v in series(t, f"{kind}/skipped_steps"))
    lines = [str(line) for t in trials for line in t.summary.get("warnings") or []]
    said = Counter(found.group(1) if (found := _WARNING.search(line)) else "other" for line in lines)
    return ArmResult(
        name=name,
        removes=arm.removes,
        overrides=dict(arm.overrides),
        status=status | {"not begun": missing},
        levels={c.key: _level(sweep, name, c) for c in columns},
        collapsed={t.state.seed: reason for t in trials if (reason := collapse(t, columns))},
        skipped_steps=round(math.fsum(skipped)),
        warnings=dict(said.most_common()),
    )


def _level(sweep: Sweep, arm: str, column: Column) -> Level:
    def values(name: str) -> dict[int, float]:
        return _by_seed(sweep, arm, lambda t: accuracy(t, column, name))

    before, after = values("held_out_before"), values("held_out_after")
    worst = min(after, key=lambda seed: after[seed], default=None)
    return Level(
        by_seed=after,
        before=mean(before.values()),
        after=mean(after.values()),
        change=mean(after[s] - before[s] for s in after if s in before),
        greedy_before=mean(values("held_out_greedy_before").values()),
        greedy_after=mean(values("held_out_greedy_after").values()),
        sd=stdev(after.values()) if len(after) > 1 else None,
        worst=None if worst is None else after[worst],
        worst_seed=worst,
    )


def collapse(trial: Trial, columns: Sequence[Column]) -> str:
    """Why the trial counts as collapsed, "" if it does not: it failed, ended FELL below its start, or PEAKED
    below its best evaluation, in any column. A trial that has not ended is not judged.
    """
    if trial.state.status == "failed":
        return "failed"
    if trial.state.status != "done":
        return ""
    for column in columns:
        before, after = (accuracy(trial, column, f"held_out_{when}") for when in ("before", "after"))
        if before is not None and after is not None and before - after > FELL:
            return f"{column.label}: ended {100 * (before - after):.1f} points below its start"
        seen = [value for _, value in evaluations(trial, column)]
        if seen and max(seen) - seen[-1] > PEAKED:
            return f"{column.label}: ended {100 * (max(seen) - seen[-1]):.1f} points below its best evaluation"
    return ""
