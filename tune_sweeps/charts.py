"""The report's charts as SVG text inside the page: they need no other file, no script and no link.

A band always spans the lowest and the highest seed; a handful of seeds supports no other statement of spread.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from tune_sweeps.analysis import Analysis
from tune_sweeps.comparison import Comparison
from tune_sweeps.guide import OwnLoss
from tune_sweeps.measures import Column, evaluations, finished, series, trials_of
from tune_sweeps.records import Sweep, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind readers can tell these apart. Markers and line styles repeat the distinction for prints without colour.
BLUE, ORANGE, RED, GREY, INK = "#2563a8", "#d9780f", "#b3261e", "#5f6368", "#202124"
_VERDICT = {"higher": (BLUE, ">"), "lower": (ORANGE, "<")}
MAX_PANELS = 24
_PER_ROW = 4
_WIDTH = 10.4
Points = Sequence[tuple[int, float]]


def differences_chart(analysis: Analysis) -> str:
    """Return a chart of arm minus reference in points: a ring per seed, the mean, its interval; a panel per column."""
    arms = [a.name for a in analysis.arms if a.name != analysis.reference]
    figure, axes = _rows_of_arms(arms, analysis.columns)
    for ax, column in zip(axes, analysis.columns, strict=True):
        ax.axvline(0, color=INK, linewidth=1)
        for y, arm in enumerate(arms):
            comparison = analysis.comparison(arm, column.key)
            if comparison:
                _draw_comparison(ax, comparison, y, 100.0)
        ax.set_xlabel(f"points against {_plain(analysis.reference or '', 24)}", fontsize=9, color=GREY)
        _widen(ax)
    return _svg(figure, "differences", "Change in held-out accuracy by arm and seed, with intervals")


def levels_chart(analysis: Analysis) -> str:
    """Return a chart of accuracy after training in points, without a reference: a ring per seed, and the mean."""
    arms = [a.name for a in analysis.arms]
    figure, axes = _rows_of_arms(arms, analysis.columns)
    for ax, column in zip(axes, analysis.columns, strict=True):
        for y, arm in enumerate(analysis.arms):
            level = arm.levels[column.key]
            _rings(ax, [100 * v for v in level.by_seed.values()], y, BLUE)
            if level.after is not None:
                ax.plot(100 * level.after, y, "D", color=BLUE, markersize=5)
        ax.set_xlabel("held-out accuracy after training, points", fontsize=9, color=GREY)
    return _svg(figure, "levels", "Held-out accuracy by arm and seed")


def strip(found: Comparison, scale: float, name: str) -> str:
    """Return one comparison as a small chart for a table's cell, or "" if it has no pairs.

    Args:
      found: the comparison.
      scale: factor from its unit to the unit shown, 100 for points.
      name: label of the chart, unique on the page.
    """
    from matplotlib.figure import Figure

    if not found.by_seed:
        return ""
    figure = Figure(figsize=(2.3, 0.52))
    ax = figure.add_axes((0.03, 0.36, 0.94, 0.62))
    ax.axvline(0, color=INK, linewidth=1)
    _draw_comparison(ax, found, 0, scale)
    _widen(ax)
    ax.set_ylim(-0.5, 0.5)
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=4)
    ax.tick_params(labelsize=7, colors=GREY, length=2, pad=1)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return _svg(figure, name, f"Difference by seed: {name}")


def learning_curves(sweep: Sweep, analysis: Analysis, column: Column) -> str:
    """Return a chart of held-out accuracy over training, a panel per arm; "" if there is nothing to draw."""
    arms = [a.name for a in analysis.arms if any(evaluations(t, column) for t in trials_of(sweep, a.name))]
    arms = arms[:MAX_PANELS]
    if not arms:
        return ""
    figure, axes = _panels(len(arms), 1.75, share=True)
    reference = _spread([_points_of(t, column) for t in finished(sweep, analysis.reference)])
    for ax, arm in zip(axes, arms, strict=True):
        is_reference = arm == analysis.reference
        color = GREY if is_reference else BLUE
        if reference and not is_reference:
            ax.plot(*_columns(reference, 0, 1), color=GREY, linewidth=1.3, linestyle="--")
        for trial in trials_of(sweep, arm):
            _draw_trial(ax, trial, _points_of(trial, column), color)
        _draw_spread(ax, _spread([_points_of(t, column) for t in finished(sweep, arm)]), color)
        ax.set_title(_plain(arm, 26) + (" (reference)" if is_reference else ""), fontsize=9.5, loc="left", color=INK)
    for ax in axes[::_PER_ROW]:
        ax.set_ylabel("points", fontsize=8.5, color=GREY)
    for ax in axes[-min(_PER_ROW, len(axes)) :]:
        ax.set_xlabel("update", fontsize=8.5, color=GREY)
    return _svg(figure, f"curves-{column.key}", f"Held-out accuracy over training, {column.label}")


def own_loss_chart(sweep: Sweep, losses: Sequence[OwnLoss], reference: str) -> str:
    """Return a chart of each removed term's loss with the term (reference) and without it; "" if none was measured."""
    drawn = []
    for loss in losses:
        with_it, without = _both_losses(sweep, loss, reference)
        if with_it or without:
            drawn.append((loss, with_it, without))
    if not drawn:
        return ""
    figure, axes = _panels(len(drawn), 1.9, share=False)
    for ax, (loss, with_it, without) in zip(axes, drawn, strict=True):
        _draw_spread(ax, with_it, BLUE, label="with the term (reference)")
        _draw_spread(ax, without, ORANGE, style="--", label="without it")
        values = [value for spread in (with_it, without) for row in spread for value in row[2:]]
        if min(values) > 0 and max(values) > 20 * min(values):
            _log_scale(ax)
        ax.set_title(_plain(f"critic/loss/{loss.term}", 28), fontsize=9.5, loc="left", color=INK)
    for ax in axes[-min(_PER_ROW, len(axes)) :]:
        ax.set_xlabel("update", fontsize=8.5, color=GREY)
    full = max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[0]))
    handles = full.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return _svg(figure, "own-loss", "Each removed term's own loss over training, with the term and without it")


def smooth(points: Points) -> list[tuple[int, float]]:
    """Return the centred running mean over a twentieth of the points, because the loss of one batch is mostly noise."""
    reach = len(points) // 40
    values = [value for _, value in points]
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [(step, math.fsum(w) / len(w)) for (step, _), w in zip(points, windows, strict=True)]


def _both_losses(sweep: Sweep, loss: OwnLoss, reference: str) -> tuple[list[Any], list[Any]]:
    metric = f"critic/loss/{loss.term}"
    with_it, without = (
        _spread([smooth(series(t, metric)) for t in finished(sweep, arm)]) for arm in (reference, loss.arm)
    )
    return with_it, without


def _points_of(trial: Trial, column: Column) -> list[tuple[int, float]]:
    return [(step, 100 * value) for step, value in evaluations(trial, column)]


def _spread(lines: Iterable[Points]) -> list[tuple[int, float, float, float]]:
    """Return (step, mean, least, greatest) over the lines that have a value at the step."""
    by_step: dict[int, list[float]] = {}
    for line in lines:
        for step, value in line:
            by_step.setdefault(step, []).append(value)
    return [(step, math.fsum(v) / len(v), min(v), max(v)) for step, v in sorted(by_step.items())]


def _columns(rows: Sequence[tuple[Any, ...]], *which: int) -> list[list[Any]]:
    return [[row[i] for row in rows] for i in which]


def _draw_spread(ax: Axes, rows: list[Any], color: str, style: str = "-", label: str | None = None) -> None:
    if rows:
        x, middle, low, high = _columns(rows, 0, 1, 2, 3)
        ax.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
        ax.plot(x, middle, color=color, linewidth=2, linestyle=style, label=label)


def _draw_trial(ax: Axes, trial: Trial, points: Points, color: str) -> None:
    """Draw a thin line: red with a cross at its end if the trial failed, dotted if it has not ended."""
    if not points:
        return
    failed = trial.state.status == "failed"
    open_ = trial.state.status in ("waiting", "running")
    ax.plot(*_columns(points, 0, 1), color=RED if failed else color, linewidth=0.8, linestyle=":" if open_ else "-")
    if failed:
        ax.plot(*points[-1], "x", color=RED, markersize=6)


def _draw_comparison(ax: Axes, comparison: Comparison, y: float, scale: float) -> None:
    color, marker = _VERDICT.get(comparison.verdict, (GREY, "D"))
    if comparison.low is not None and comparison.high is not None:
        ax.plot([scale * comparison.low, scale * comparison.high], [y, y], color=color, linewidth=5, alpha=0.3)
    _rings(ax, [scale * d for d in comparison.by_seed.values()], y, color)
    if comparison.mean is not None:
        ax.plot(scale * comparison.mean, y, marker, color=color, markersize=6)


def _rings(ax: Axes, values: Sequence[float], y: float, color: str) -> None:
    ax.plot(values, [y] * len(values), "o", markerfacecolor="white", markeredgecolor=color, markersize=5)


def _widen(ax: Axes) -> None:
    """Widen the x axis so that 0 is inside, with a margin on both sides."""
    low, high = ax.get_xlim()
    low, high = min(low, 0.0), max(high, 0.0)
    ax.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _rows_of_arms(arms: Sequence[str], columns: Sequence[Column]) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.9 + 0.32 * max(2, len(arms))), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, column in zip(axes, columns, strict=True):
        ax.set_title(_plain(column.label, 60), fontsize=10.5, loc="left", color=INK)
        for y in range(len(arms)):
            ax.axhline(y, color="#eeeeee", linewidth=0.8, zorder=0)
        _tidy(ax, "x")
    axes[0].set_yticks(range(len(arms)), [_plain(a, 40) for a in arms], fontsize=9.5)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    return figure, list(axes)


def _panels(count: int, height: float, share: bool) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows = math.ceil(count / _PER_ROW)
    figure = Figure(figsize=(_WIDTH, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, _PER_ROW, sharex=share, sharey=share, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        _tidy(ax, "y")
        ax.tick_params(labelsize=8, labelbottom=True)
    return figure, list(axes[:count])


def _tidy(ax: Axes, grid: str) -> None:
    ax.grid(axis=grid, color="#e3e3e3", linewidth=0.7)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#9aa0a6")
    ax.tick_params(labelsize=9, colors="#3c4043")


def _log_scale(ax: Axes) -> None:
    """Make the y axis logarithmic, labelled 0.1, 0.3, 1 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _plain(text: str, limit: int) -> str:
    """Return the text on one line of at most ``limit`` characters, with ``$`` escaped so that it starts no maths."""
    flat = " ".join(text.split())
    short = flat if len(flat) <= limit else flat[: limit - 1] + "…"
    return short.replace("$", r"\$")


def _svg(figure: Figure, name: str, label: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the prolog, which names a DTD on the web
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure has the same ids, and a page may have each once
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
