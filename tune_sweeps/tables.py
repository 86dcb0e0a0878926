"""The report's tables: numbers as plain strings, the same for the page and for its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tune_sweeps.analysis import Analysis, ArmResult
from tune_sweeps.comparison import LEVEL, MIN_PAIRS, Comparison
from tune_sweeps.guide import GuideRow, OwnLoss
from tune_sweeps.measures import Column, accuracy
from tune_sweeps.records import Sweep, Trial

NONE = "–"
MARKS = {"higher": "▲", "lower": "▼", "shown": "✓", "not shown": "✗", "not tested": NONE, "the seeds cannot tell": "?"}


@dataclass(frozen=True)
class Table:
    """A table of the report. The first line of a cell is the value, a second line explains it.

    Attributes:
      pictures: an SVG for each row, shown on the page in the column ``picture_column``.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    pictures: Sequence[str] = ()
    picture_column: int = -1


def changes_table(analysis: Analysis, column: Column) -> Table:
    """Return the accuracies of every arm in a column, and its comparison with the reference."""
    headers = ["arm", "before", "after", "change", "against reference", f"{LEVEL:.0%} interval", "by seed", "verdict"]
    rows = []
    for arm in analysis.arms:
        row = [_name(arm.name, analysis), *_accuracies(arm, column)]
        comparison = analysis.comparison(arm.name, column.key)
        greedy = analysis.comparison(arm.name, column.key, greedy=True)
        if comparison:
            verdict = f"{MARKS[comparison.verdict]} {comparison.verdict}\n{comparison.reason}"
            row += [*_difference(comparison, True), verdict]
        else:
            row += [NONE] * 3 + ["reference"]
        after = points(arm.levels[column.key].greedy_after)
        row.append(after + (f"\n{points(greedy.mean, True)} against reference" if greedy and greedy.by_seed else ""))
        rows.append(row)
    return Table(column.label, [*headers, "greedy after"], rows)


def levels_table(analysis: Analysis, column: Column) -> Table:
    """Return the accuracies of every arm in a column, for a sweep without a reference."""
    headers = ("arm", "before", "after", "change", "spread", "by seed", "greedy before", "greedy after")
    rows = []
    for arm in analysis.arms:
        level = arm.levels[column.key]
        seeds = ", ".join(points(v) for v in level.by_seed.values()) or NONE
        greedy = map(points, (level.greedy_before, level.greedy_after))
        rows.append([arm.name, *_accuracies(arm, column), points(level.sd), seeds, *greedy])
    return Table(column.label, headers, rows)


def guide_table(guide: Sequence[GuideRow], strips: Sequence[str]) -> Table:
    """Return a row for each of the guide's expectations, with the chart of its comparison from ``strips``."""
    headers = ("without", "the guide expects", "measured by", "with it", "without it", "difference", "in this sweep")
    rows = [
        [
            f"{row.arm}\n{row.expected.name}",
            row.expected.expects,
            f"{row.expected.diagnostic}\nexpected: {row.expected.direction}",
            _number(row.comparison.reference_mean, row.expected.percent),
            _number(row.comparison.arm_mean, row.expected.percent),
            "\n".join(_difference(row.comparison, row.expected.percent)[:2]),
            f"{MARKS[row.shown]} {row.shown}\n{row.why}",
        ]
        for row in guide
    ]
    return Table("", headers, rows, strips, headers.index("difference"))


def stability_table(analysis: Analysis) -> Table:
    """Return the spread over seeds, the worst seed, collapsed runs, skipped steps and warnings of every arm."""
    headers = ["arm", "done"]
    for column in analysis.columns:
        headers += [f"spread, {_short(column)}", f"worst seed, {_short(column)}"]
    headers += ["collapsed", "skipped steps", "warnings"]
    rows = []
    for arm in analysis.arms:
        row = [_name(arm.name, analysis), f"{arm.status['done']} of {sum(arm.status.values())}"]
        for column in analysis.columns:
            level = arm.levels[column.key]
            worst = NONE if level.worst is None else f"{points(level.worst)}\nseed {level.worst_seed}"
            row += [points(level.sd), worst]
        why = "; ".join(f"seed {seed} {reason}" for seed, reason in arm.collapsed.items())
        ended = arm.status["done"] + arm.status["failed"]
        row.append(f"{len(arm.collapsed)} of {ended}" + (f"\n{why}" if why else ""))
        row.append(str(arm.skipped_steps))
        row.append(", ".join(f"{name} {n}" for name, n in arm.warnings.items()) or NONE)
        rows.append(row)
    return Table("", headers, rows)


def losses_table(losses: Sequence[OwnLoss]) -> Table:
    """Return the late means of each removed term's own loss, with the term and without it."""
    headers = ("arm", "loss", "with the term", "without it", "difference", f"{LEVEL:.0%} interval", "by seed")
    rows = []
    for loss in losses:
        comparison = loss.comparison
        means = [significant(comparison.reference_mean), significant(comparison.arm_mean)]
        rows.append([loss.arm, f"critic/loss/{loss.term}", *means, *_difference(comparison, False)])
    return Table("Late means", headers, rows)


def trials_table(sweep: Sweep, analysis: Analysis) -> Table:
    """Return a row for every trial of the sweep, those that have not begun last."""
    headers = ["arm", "seed", "status", "attempts", "seconds", "to first step, s", "updates"]
    headers += [f"{_short(c)}: before → after" for c in analysis.columns]
    rows = [_trial_row(t, analysis.columns) for t in sweep.trials]
    begun = {(t.state.arm, t.state.seed) for t in sweep.trials}
    fixed = [] if sweep.grid.space else [(a.name, seed) for a in sweep.grid.arms for seed in sweep.seeds]
    missing = [pair for pair in fixed if pair not in begun]
    rows += [[arm, str(seed), "not begun", *[NONE] * (len(headers) - 3)] for arm, seed in missing]
    return Table("", headers, rows)


def arms_table(sweep: Sweep) -> Table:
    """Return the loss term that each arm removes, and its overrides."""
    rows = [
        [arm.name, arm.removes or NONE, "  ".join(f"{k}={v}" for k, v in arm.overrides.items()) or "as the base config"]
        for arm in sweep.grid.arms
    ]
    return Table("Arms", ("arm", "removes", "overrides"), rows)


def points(value: float | None, signed: bool = False) -> str:
    """Return a share as points, with one decimal; a dash for None."""
    return NONE if value is None else _minus(f"{100 * value:{'+' if signed else ''}.1f}")


def significant(value: float | None, signed: bool = False) -> str:
    """Return a number with three significant digits; a dash for None."""
    return NONE if value is None else _minus(f"{value:{'+' if signed else ''}.3g}")


def _accuracies(arm: ArmResult, column: Column) -> list[str]:
    level = arm.levels[column.key]
    return [points(level.before), points(level.after), points(level.change, signed=True)]


def _trial_row(trial: Trial, columns: Sequence[Column]) -> list[str]:
    state = trial.state
    updates = str(trial.metrics[-1]["step"]) if trial.metrics else NONE
    row = [state.arm, str(state.seed), state.status, str(state.attempts)]
    row += [f"{state.seconds:,.0f}", f"{state.start_seconds:,.1f}", updates]
    for column in columns:
        before = accuracy(trial, column, "held_out_before")
        after = accuracy(trial, column, "held_out_after")
        row.append(f"{points(before)} → {points(after)}")
    return row


def _name(arm: str, analysis: Analysis) -> str:
    return f"{arm}\nreference" if arm == analysis.reference else arm


def _short(column: Column) -> str:
    return column.label.partition(" (")[0]


def _number(value: float | None, percent: bool, signed: bool = False) -> str:
    return points(value, signed) if percent else significant(value, signed)


def _difference(comparison: Comparison, percent: bool) -> list[str]:
    """Return the mean difference, its interval, and the difference of each seed."""
    span = f"no interval: {len(comparison.by_seed)} of {MIN_PAIRS} pairs"
    if comparison.low is not None:
        span = f"{_number(comparison.low, percent, True)} to {_number(comparison.high, percent, True)}"
    seeds = ", ".join(_number(d, percent, True) for d in comparison.by_seed.values())
    return [_number(comparison.mean, percent, True), span, seeds or NONE]


def _minus(text: str) -> str:
    return text.replace("-", "−")
