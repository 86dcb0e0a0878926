"""The report's sections, once for the page and for its Markdown: text, pictures and tables of plain strings."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tune_sweeps import charts
from tune_sweeps.analysis import (
    FELL,
    LEVEL,
    MIN_PAIRS,
    PEAKED,
    Analysis,
    ArmResult,
    Column,
    Comparison,
    accuracy,
    by_chance,
)
from tune_sweeps.guide import GuideRow, OwnLoss
from tune_sweeps.records import Sweep, Trial

NONE = "–"
MARKS = {"higher": "▲", "lower": "▼", "shown": "✓", "not shown": "✗", "not tested": NONE, "the seeds cannot tell": "?"}


@dataclass(frozen=True)
class Table:
    """A cell's first line is what it says, a second one why. ``pictures``: an SVG per row, in a column of the page."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    pictures: Sequence[str] = ()
    picture_column: int = -1


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)  # SVG and caption
    tables: list[Table] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)  # caption and text, e.g. a failed trial's error


def all_sections(
    sweep: Sweep, analysis: Analysis, guide: Sequence[GuideRow], losses: Sequence[OwnLoss]
) -> list[Section]:
    """In reading order; a section with nothing in it is left out."""
    made = [
        accuracy_section(analysis, counted(analysis, guide)),
        guide_section(guide),
        stability_section(analysis),
        loss_section(sweep, analysis, losses),
        curves_section(sweep, analysis),
        trials_section(sweep, analysis),
        setup_section(sweep),
    ]
    return [s for s in made if s.pictures or s.tables or s.code]


def counted(analysis: Analysis, guide: Sequence[GuideRow]) -> list[Comparison]:
    """Everything on the page that gets a verdict, once: of ``gain`` the guide looks at an accuracy again."""
    return [*analysis.accuracy, *(row.comparison for row in guide if row.term != "gain")]


def accuracy_section(analysis: Analysis, comparisons: Sequence[Comparison]) -> Section:
    if analysis.reference is None:
        text = ["No arm is the reference, so none is compared. Each ring is a seed, the diamond their mean, in points."]
        tables = [_levels_table(analysis, column) for column in analysis.columns]
        charted = [(charts.levels_chart(analysis), "")] if analysis.columns else []
        return Section("Held-out accuracy", text, charted, tables)
    tables = [_changes_table(analysis, column) for column in analysis.columns]
    charted = [(charts.differences_chart(analysis), "")] if analysis.accuracy else []
    text = [
        f"Held-out accuracy after training, sampled as in training, of each arm minus that of {analysis.reference} "
        f"with the same seed, in points (1 point = 0.01). Each ring is a seed; the bar is the {LEVEL:.0%} interval of "
        "their mean from a bootstrap over seeds.",
        *chance_text(comparisons),
    ]
    return Section("Change in held-out accuracy", text, charted, tables)


def chance_text(comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader must know before believing a verdict."""
    judged = [c for c in comparisons if c.low is not None]
    rule = (
        f"▲ higher and ▼ lower are written only where at least {MIN_PAIRS} pairs of seeds all agree on the sign "
        "and the interval leaves 0 out. Anything else is ?: the seeds cannot tell, which is not the same as no effect."
    )
    if not judged:
        return [rule]
    k = len(judged)
    odds = ", ".join(f"{n} pairs one time in {2 ** (n - 1)}" for n in sorted({len(c.by_seed) for c in judged}))
    return [
        rule,
        f"The page makes {k} such comparisons, so some verdicts are chance: if no arm differed from the reference at "
        f"all, exact {LEVEL:.0%} intervals would let about {k * (1 - LEVEL):.1f} of them stand out. Intervals from few "
        f"seeds are narrower than they say, and equal signs come up by chance ({odds}): by this page's rule "
        f"expect about {by_chance(judged):.1f}. They come together, since all arms are compared with the same runs of "
        "the reference: one lucky seed of it makes many arms look worse. Believe a verdict when more seeds repeat it.",
    ]


def guide_section(guide: Sequence[GuideRow]) -> Section:
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
    headers = ("without", "the guide expects", "measured by", "with it", "without it", "difference", "in this sweep")
    strips = [charts.strip(r.comparison, 100.0 if r.expected.percent else 1.0, f"strip-{r.arm}") for r in guide]
    text = [
        "For each removed term: what the guide says will happen, the measurement that would show it, and whether "
        "it moved that way here. Late means the last fifth of a run's updates; accuracies are in points, the rest in "
        "the units of the returns or of the loss. ✓ shown says that the seeds agree on the direction, not that the "
        "change is large; ✗ not shown that they agree on the other one."
    ]
    return Section(
        "What the guide expects",
        text,
        [],
        [Table("", headers, rows, strips, headers.index("difference"))] if rows else [],
    )


def stability_section(analysis: Analysis) -> Section:
    headers = ["arm", "done"]
    for column in analysis.columns:
        headers += [f"spread, {_short(column)}", f"worst seed, {_short(column)}"]
    rows = []
    for arm in analysis.arms:
        row = [_name(arm.name, analysis), f"{arm.status['done']} of {sum(arm.status.values())}"]
        for column in analysis.columns:
            level = arm.levels[column.key]
            worst = NONE if level.worst is None else f"{points(level.worst)}\nseed {level.worst_seed}"
            row += [points(level.sd), worst]
        why = "; ".join(f"seed {seed} {reason}" for seed, reason in arm.collapsed.items())
        ended = arm.status["done"] + arm.status["failed"]
        said = ", ".join(f"{name} {n}" for name, n in arm.warnings.items())
        row += [f"{len(arm.collapsed)} of {ended}" + (f"\n{why}" if why else ""), str(arm.skipped_steps), said or NONE]
        rows.append(row)
    text = [
        "Spread is the standard deviation over seeds of accuracy after training, in points; where the sweep makes "
        "the base models, each seed has its own, which is part of it. A run counts as collapsed when it failed, when "
        f"its held-out accuracy ended more than {100 * FELL:.0f} points below its start, or more than "
        f"{100 * PEAKED:.0f} points below its own best evaluation. Skipped steps had a loss or gradient that was not "
        "finite. Warnings, counted by name, are those of finished runs (docs/troubleshooting.md has their table)."
    ]
    headers += ["collapsed", "skipped steps", "warnings"]
    return Section("Training stability", text, [], [Table("", headers, rows)])


def loss_section(sweep: Sweep, analysis: Analysis, losses: Sequence[OwnLoss]) -> Section:
    chart = charts.own_loss_chart(sweep, losses, analysis.reference) if losses and analysis.reference else ""
    rows = [
        [x.arm, f"critic/loss/{x.term}", *map(significant, (c.reference_mean, c.arm_mean)), *_difference(c, False)]
        for x in losses
        for c in [x.comparison]
    ]
    headers = ("arm", "loss", "with the term", "without it", "difference", f"{LEVEL:.0%} interval", "by seed")
    text = [
        "Every term is measured before its weight, also where it is removed. Lines are means over seeds of a running "
        "mean over a twentieth of the updates, bands the least and the greatest seed; the table has late means. "
        "Where the loss stays as low without its term, the term is not what kept it low."
    ]
    tables = [Table("Late means", headers, rows)] if chart else []
    return Section("Each term's own loss", text, [(chart, "")] if chart else [], tables)


def curves_section(sweep: Sweep, analysis: Analysis) -> Section:
    drawn = [(charts.learning_curves(sweep, analysis, c), c.label) for c in analysis.columns]
    text = [
        "Held-out accuracy, sampled, in points. Thin lines are runs, the thick one the mean of the finished ones, the "
        "band the least and the greatest; dotted: not ended; red with a cross: failed"
        + ("; dashed grey: the reference's mean." if analysis.reference else ".")
    ]
    if len(analysis.arms) > charts.MAX_PANELS:
        text.append(f"The first {charts.MAX_PANELS} arms are drawn.")
    return Section("Learning curves", text, [(svg, label) for svg, label in drawn if svg])


def trials_section(sweep: Sweep, analysis: Analysis) -> Section:
    headers = ["arm", "seed", "status", "attempts", "seconds", "to first step, s", "updates"]
    headers += [f"{_short(c)}: before → after" for c in analysis.columns]
    rows = [_trial_row(t, analysis.columns) for t in sweep.trials]
    begun = {(t.state.arm, t.state.seed) for t in sweep.trials}
    fixed = [] if sweep.grid.space else [(a.name, seed) for a in sweep.grid.arms for seed in sweep.seeds]
    missing = [pair for pair in fixed if pair not in begun]
    rows += [[arm, str(seed), "not begun", *[NONE] * (len(headers) - 3)] for arm, seed in missing]
    said = [(f"{t.state.arm}, seed {t.state.seed}: {t.state.status}", t.state.error) for t in sweep.trials]
    return Section("Every trial", [], [], [Table("", headers, rows)], [(who, error) for who, error in said if error])


def setup_section(sweep: Sweep) -> Section:
    rows = [
        [arm.name, arm.removes or NONE, "  ".join(f"{k}={v}" for k, v in arm.overrides.items()) or "as the base config"]
        for arm in sweep.grid.arms
    ]
    return Section(
        "How to repeat it",
        [f"Seeds: {', '.join(map(str, sweep.seeds))}. The arms of a seed share their base model and data order."],
        tables=[Table("Arms", ("arm", "removes", "overrides"), rows)],
        code=[("Command", repeat_command(sweep))],
    )


def repeat_command(sweep: Sweep) -> str:
    """As typed in a shell."""
    grid = sweep.grid_source or sweep.grid.name
    words = ["dvpo", "sweep", "--config", sweep.config, "--grid", grid, "--seeds", str(len(sweep.seeds))]
    return shlex.join([*words, *sweep.overrides])


def points(value: float | None, signed: bool = False) -> str:
    """A share as points, one decimal."""
    return NONE if value is None else _minus(f"{100 * value:{'+' if signed else ''}.1f}")


def significant(value: float | None, signed: bool = False) -> str:
    return NONE if value is None else _minus(f"{value:{'+' if signed else ''}.3g}")


def _changes_table(analysis: Analysis, column: Column) -> Table:
    headers = ["arm", "before", "after", "change", "against reference", f"{LEVEL:.0%} interval", "by seed", "verdict"]
    rows = []
    for arm in analysis.arms:
        row = [_name(arm.name, analysis), *_levels(arm, column)]
        found, greedy = analysis.comparison(arm.name, column.key), analysis.comparison(arm.name, column.key, True)
        if found:
            verdict = f"{MARKS[found.verdict]} {found.verdict}\n{found.reason}"
            row += [*_difference(found, True), verdict]
        else:
            row += [NONE] * 3 + ["reference"]
        after = points(arm.levels[column.key].greedy_after)
        row.append(after + (f"\n{points(greedy.mean, True)} against reference" if greedy and greedy.by_seed else ""))
        rows.append(row)
    return Table(column.label, [*headers, "greedy after"], rows)


def _levels_table(analysis: Analysis, column: Column) -> Table:
    headers = ("arm", "before", "after", "change", "spread", "by seed", "greedy before", "greedy after")
    rows = []
    for arm in analysis.arms:
        level = arm.levels[column.key]
        seeds = ", ".join(points(v) for v in level.by_seed.values()) or NONE
        greedy = map(points, (level.greedy_before, level.greedy_after))
        rows.append([arm.name, *_levels(arm, column), points(level.sd), seeds, *greedy])
    return Table(column.label, headers, rows)


def _levels(arm: ArmResult, column: Column) -> list[str]:
    found = arm.levels[column.key]
    return [points(found.before), points(found.after), points(found.change, signed=True)]


def _trial_row(trial: Trial, columns: Sequence[Column]) -> list[str]:
    state, of = trial.state, partial(accuracy, trial)
    updates = str(trial.metrics[-1]["step"]) if trial.metrics else NONE
    row = [state.arm, str(state.seed), state.status, str(state.attempts)]
    row += [f"{state.seconds:,.0f}", f"{state.start_seconds:,.1f}", updates]
    return row + [f"{points(of(c, 'held_out_before'))} → {points(of(c, 'held_out_after'))}" for c in columns]


def _name(arm: str, analysis: Analysis) -> str:
    return f"{arm}\nreference" if arm == analysis.reference else arm


def _short(column: Column) -> str:
    return column.label.partition(" (")[0]


def _number(value: float | None, percent: bool, signed: bool = False) -> str:
    return points(value, signed) if percent else significant(value, signed)


def _difference(found: Comparison, percent: bool) -> list[str]:
    """Mean, interval, and the seeds' own."""
    span = f"no interval: {len(found.by_seed)} of {MIN_PAIRS} pairs"
    if found.low is not None:
        span = f"{_number(found.low, percent, True)} to {_number(found.high, percent, True)}"
    seeds = ", ".join(_number(d, percent, True) for d in found.by_seed.values())
    return [_number(found.mean, percent, True), span, seeds or NONE]


def _minus(text: str) -> str:
    return text.replace("-", "−")
