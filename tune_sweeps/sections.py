"""The report's sections, used for the page and for its Markdown: text, charts and tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from tune_sweeps import charts
from tune_sweeps.analysis import FELL, PEAKED, Analysis
from tune_sweeps.comparison import LEVEL, MIN_PAIRS, Comparison, by_chance
from tune_sweeps.guide import GuideRow, OwnLoss
from tune_sweeps.records import Sweep
from tune_sweeps.tables import (
    Table,
    arms_table,
    changes_table,
    guide_table,
    levels_table,
    losses_table,
    stability_table,
    trials_table,
)


@dataclass(frozen=True)
class Section:
    """A section of the report, shown in the order of its fields.

    Attributes:
      text: paragraphs.
      pictures: pairs of SVG and caption.
      code: pairs of caption and text, e.g. the error of a failed trial.
    """

    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)


def all_sections(
    sweep: Sweep, analysis: Analysis, guide: Sequence[GuideRow], losses: Sequence[OwnLoss]
) -> list[Section]:
    """Return the sections in reading order, without those that would be empty."""
    sections = [
        accuracy_section(analysis, counted(analysis, guide)),
        guide_section(guide),
        stability_section(analysis),
        loss_section(sweep, analysis, losses),
        curves_section(sweep, analysis),
        trials_section(sweep, analysis),
        setup_section(sweep),
    ]
    return [s for s in sections if s.pictures or s.tables or s.code]


def counted(analysis: Analysis, guide: Sequence[GuideRow]) -> list[Comparison]:
    """Return every comparison on the page that gets a verdict, each once.

    The guide's row for ``gain`` is left out: it repeats a comparison of accuracy.
    """
    return [*analysis.accuracy, *(row.comparison for row in guide if row.term != "gain")]


def accuracy_section(analysis: Analysis, comparisons: Sequence[Comparison]) -> Section:
    """Return the section on held-out accuracy: changes against the reference, or levels if there is none.

    Args:
      comparisons: all comparisons of the page, see ``counted``.
    """
    if analysis.reference is None:
        text = ["No arm is the reference, so none is compared. Each ring is a seed, the diamond their mean, in points."]
        tables = [levels_table(analysis, column) for column in analysis.columns]
        pictures = [(charts.levels_chart(analysis), "")] if analysis.columns else []
        return Section("Held-out accuracy", text, pictures, tables)
    tables = [changes_table(analysis, column) for column in analysis.columns]
    pictures = [(charts.differences_chart(analysis), "")] if analysis.accuracy else []
    text = [
        f"Held-out accuracy after training, sampled as in training, of each arm minus that of {analysis.reference} "
        f"with the same seed, in points (1 point = 0.01). Each ring is a seed; the bar is the {LEVEL:.0%} interval of "
        "their mean (Student's t over seeds).",
        *chance_text(comparisons),
    ]
    return Section("Change in held-out accuracy", text, pictures, tables)


def chance_text(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the rule of the verdicts, and how many of them to expect by chance."""
    with_interval = [c for c in comparisons if c.low is not None]
    rule = (
        f"▲ higher and ▼ lower are written only where at least {MIN_PAIRS} pairs of seeds all agree on the sign "
        "and the interval leaves 0 out. Anything else is ?: the seeds cannot tell, which is not the same as no effect."
    )
    if not with_interval:
        return [rule]
    expected = by_chance(with_interval)
    return [
        rule,
        f"The page makes {len(with_interval)} such comparisons, so some verdicts may be chance: if no arm differed "
        f"from the reference at all, {LEVEL:.0%} intervals would let about {expected:.1f} of them stand out. "
        "They come together, since all arms are compared with the same runs of "
        "the reference: one lucky seed of it makes many arms look worse. Believe a verdict when more seeds repeat it.",
    ]


def guide_section(guide: Sequence[GuideRow]) -> Section:
    """Return the section on the guide's expectations, a row for each."""
    strips = [charts.strip(r.comparison, 100.0 if r.expected.percent else 1.0, f"strip-{r.arm}") for r in guide]
    text = [
        "For each removed term: what the guide says will happen, the measurement that would show it, and whether "
        "it moved that way here. Late means the last fifth of a run's updates; accuracies are in points, the rest in "
        "the units of the returns or of the loss. ✓ shown says that the seeds agree on the direction, not that the "
        "change is large; ✗ not shown that they agree on the other one."
    ]
    return Section("What the guide expects", text, [], [guide_table(guide, strips)] if guide else [])


def stability_section(analysis: Analysis) -> Section:
    """Return the section on spread over seeds and on collapsed runs."""
    text = [
        "Spread is the standard deviation over seeds of accuracy after training, in points; where the sweep makes "
        "the base models, each seed has its own, which is part of it. A run counts as collapsed when it failed, when "
        f"its held-out accuracy ended more than {100 * FELL:.0f} points below its start, or more than "
        f"{100 * PEAKED:.0f} points below its own best evaluation. Skipped steps had a loss or gradient that was not "
        "finite. Warnings, counted by name, are those of finished runs (docs/troubleshooting.md has their table)."
    ]
    return Section("Training stability", text, [], [stability_table(analysis)])


def loss_section(sweep: Sweep, analysis: Analysis, losses: Sequence[OwnLoss]) -> Section:
    """Return the section on each removed term's own loss; empty if none was measured."""
    chart = charts.own_loss_chart(sweep, losses, analysis.reference) if losses and analysis.reference else ""
    text = [
        "Every term is measured before its weight, also where it is removed. Lines are means over seeds of a running "
        "mean over a twentieth of the updates, bands the least and the greatest seed; the table has late means. "
        "Where the loss stays as low without its term, the term is not what kept it low."
    ]
    tables = [losses_table(losses)] if chart else []
    return Section("Each term's own loss", text, [(chart, "")] if chart else [], tables)


def curves_section(sweep: Sweep, analysis: Analysis) -> Section:
    """Return the section of learning curves, a chart per column."""
    charted = [(charts.learning_curves(sweep, analysis, c), c.label) for c in analysis.columns]
    text = [
        "Held-out accuracy, sampled, in points. Thin lines are runs, the thick one the mean of the finished ones, the "
        "band the least and the greatest; dotted: not ended; red with a cross: failed"
        + ("; dashed grey: the reference's mean." if analysis.reference else ".")
    ]
    if len(analysis.arms) > charts.MAX_PANELS:
        text.append(f"The first {charts.MAX_PANELS} arms are drawn.")
    return Section("Learning curves", text, [(svg, label) for svg, label in charted if svg])


def trials_section(sweep: Sweep, analysis: Analysis) -> Section:
    """Return the section with the table of all trials, and the errors of those that have one."""
    errors = [
        (f"{t.state.arm}, seed {t.state.seed}: {t.state.status}", t.state.error) for t in sweep.trials if t.state.error
    ]
    return Section("Every trial", [], [], [trials_table(sweep, analysis)], errors)


def setup_section(sweep: Sweep) -> Section:
    """Return the section that says how to repeat the sweep."""
    return Section(
        "How to repeat it",
        [f"Seeds: {', '.join(map(str, sweep.seeds))}. The arms of a seed share their base model and data order."],
        tables=[arms_table(sweep)],
        code=[("Command", repeat_command(sweep))],
    )


def repeat_command(sweep: Sweep) -> str:
    """Return the sweep's command line, quoted for a shell."""
    grid = sweep.grid_source or sweep.grid.name
    words = ["dvpo", "sweep", "--config", sweep.config, "--grid", grid, "--seeds", str(len(sweep.seeds))]
    return shlex.join([*words, *sweep.overrides])
