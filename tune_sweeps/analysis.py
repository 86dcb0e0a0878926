"""Analyse a sweep: accuracy of every arm, comparisons with the reference, collapsed runs, and warnings.

Accuracies are shares (0.5 is 50 points). Only finished trials enter a mean; the others are counted. No number here
is NaN: what was not measured is None.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import stdev
from typing import Any

from tune_sweeps.comparison import Comparison, compare
from tune_sweeps.measures import Column, accuracy, evaluations, mean, series, trials_of, values_by_seed
from tune_sweeps.records import Sweep, Trial

FELL, PEAKED = 0.02, 0.05  # what counts as a collapse, in accuracy
_HELD_OUT = re.compile(r"hold[_-]?out|held[_-]?out")
_WARNING = re.compile(r"\[([^\]]+)\]")


@dataclass(frozen=True)
class Level:
    """Accuracy of an arm's finished trials in one column.

    Attributes:
      by_seed: sampled accuracy after training.
      change: mean of after - before, over the seeds that have both.
      sd: standard deviation of ``by_seed``, with n - 1 in the denominator.
      worst: the lowest accuracy after training, of ``worst_seed``.
    """

    by_seed: dict[int, float]
    before: float | None
    after: float | None
    change: float | None
    greedy_before: float | None
    greedy_after: float | None
    sd: float | None
    worst: float | None
    worst_seed: int | None


@dataclass(frozen=True)
class ArmResult:
    """What became of an arm's trials.

    Attributes:
      removes: the loss term that the arm leaves out.
      status: number of trials that are done, failed, unfinished, or not begun.
      levels: accuracies by the key of the column.
      collapsed: the reason for each seed whose run collapsed.
      skipped_steps, warnings: sums over all trials, also unfinished ones; warnings are counted by name.
    """

    name: str
    removes: str | None
    overrides: dict[str, Any]
    status: dict[str, int]
    levels: dict[str, Level]
    collapsed: dict[int, str]
    skipped_steps: int
    warnings: dict[str, int]


@dataclass(frozen=True)
class Analysis:
    """Everything that the report says of a sweep, except for the loss terms.

    Attributes:
      reference: name of the reference arm; None if the grid has none, or no arm of that name.
      accuracy, greedy: comparisons of sampled and of greedy accuracy after training. The measure is the column's key.
        They are ordered by arm, as in the grid, and then by column.
    """

    reference: str | None
    columns: list[Column]
    arms: list[ArmResult]
    accuracy: list[Comparison]
    greedy: list[Comparison]

    def comparison(self, arm: str, column: str, greedy: bool = False) -> Comparison | None:
        """Return the comparison of an arm in the column with that key, or None if there is none."""
        comparisons = self.greedy if greedy else self.accuracy
        return next((c for c in comparisons if (c.arm, c.measure) == (arm, column)), None)


def analyse(sweep: Sweep) -> Analysis:
    """Return the analysis of a sweep. Loss terms are left to guide.py."""
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
    """Return the columns of a sweep's report: splits in distribution, and splits out of distribution.

    A split is out of distribution if its name has "ood", or "out" other than in "held out". A single split is one
    column under its own name.
    """
    splits = dict.fromkeys(s for t in sweep.trials for s in t.summary.get("held_out_after") or {})
    if not splits:  # no trial has finished: take the splits of the evaluations
        names = dict.fromkeys(name for t in sweep.trials for row in t.metrics for name in row)
        splits = dict.fromkeys(n.split("/")[1] for n in names if re.fullmatch(r"eval/[^/]+/accuracy", n))
    if len(splits) == 1:
        (only,) = splits
        return [Column("in", f"held out ({only})", (only,))]
    out = tuple(s for s in splits if "ood" in s.lower())
    if not out:
        out = tuple(s for s in splits if "out" in _HELD_OUT.sub("", s.lower()))
    inside = tuple(s for s in splits if s not in out)
    columns = []
    if inside:
        columns.append(Column("in", f"in distribution ({', '.join(inside)})", inside))
    if out:
        columns.append(Column("ood", f"out of distribution ({', '.join(out)})", out))
    return columns


def _arm_result(sweep: Sweep, name: str, columns: list[Column]) -> ArmResult:
    arm = next(a for a in sweep.grid.arms if a.name == name)
    trials = trials_of(sweep, name)
    count = Counter(t.state.status for t in trials)
    # A searched space has no fixed list of trials to wait for.
    missing = 0 if sweep.grid.space else len(set(sweep.seeds) - {t.state.seed for t in trials})
    status = {"done": count["done"], "failed": count["failed"], "unfinished": count["waiting"] + count["running"]}
    skipped = (v for t in trials for kind in ("policy", "critic") for _, v in series(t, f"{kind}/skipped_steps"))
    warnings = Counter(_warning_name(str(line)) for t in trials for line in t.summary.get("warnings") or [])
    reasons = {t.state.seed: collapse(t, columns) for t in trials}
    return ArmResult(
        name=name,
        removes=arm.removes,
        overrides=dict(arm.overrides),
        status=status | {"not begun": missing},
        levels={c.key: _level(sweep, name, c) for c in columns},
        collapsed={seed: reason for seed, reason in reasons.items() if reason},
        skipped_steps=round(math.fsum(skipped)),
        warnings=dict(warnings.most_common()),
    )


def _warning_name(line: str) -> str:
    """Return the name that a warning has in brackets."""
    match = _WARNING.search(line)
    return match.group(1) if match else "other"


def _level(sweep: Sweep, arm: str, column: Column) -> Level:
    def values(name: str) -> dict[int, float]:
        return values_by_seed(sweep, arm, lambda t: accuracy(t, column, name))

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
    """Return why the trial counts as collapsed, or "" if it does not.

    A trial has collapsed if it failed or if, in any column, its accuracy ended more than FELL below its start or more
    than PEAKED below its best evaluation. A trial that has not ended is not judged.
    """
    if trial.state.status == "failed":
        return "failed"
    if trial.state.status != "done":
        return ""
    for column in columns:
        before, after = (accuracy(trial, column, f"held_out_{when}") for when in ("before", "after"))
        if before is not None and after is not None and before - after > FELL:
            return f"{column.label}: ended {100 * (before - after):.1f} points below its start"
        values = [value for _, value in evaluations(trial, column)]
        if values and max(values) - values[-1] > PEAKED:
            return f"{column.label}: ended {100 * (max(values) - values[-1]):.1f} points below its best evaluation"
    return ""
