"""More pictures of the critic: every quantile along a response, each head on its own, and the fan over training."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dvpo_service.tracking.figures import (
    BLUE,
    GREY,
    RED,
    FanData,
    at_level,
    draw_fan,
    drawable,
    legend_below,
    name_panel,
    panels,
    printable,
    tidy,
    token_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
MAX_STEPS = 6  # columns of the fan over training
# Okabe and Ito's colours, which colour-blind people can tell apart; the line styles help when there are more heads.
_HEAD_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_HEAD_LINES = ("-", "--", ":", "-.")
_MAX_NAMED = 8  # heads in the legend
_NARROW_LABELS = 10


def quantile_heatmap(charts: list[FanData], step: int) -> Figure:
    """Draw the predicted return as a colour, over the tokens (x) and the quantile levels (y), a panel per response.

    All panels share one colour scale. Raises ValueError when no response has a token.
    """
    charts = drawable(charts)
    figure, axes, cols = panels(charts, height=2.9)
    # Percentiles: the outermost atoms of a critic early in training would take up the whole scale.
    low, high = np.percentile(np.concatenate([c.quantiles.ravel() for c in charts]), [1, 99])
    image = None
    for (ax,), chart in zip(axes, charts, strict=True):
        x = np.arange(len(chart.tokens) + 1) - 0.5
        image = ax.pcolormesh(
            x, _edges(chart.levels), chart.quantiles.T, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6)
        )
        token_ticks(ax, chart.tokens)
        tidy(ax)
        ax.grid(False)
        ax.set_ylim(0, 1)
        name_panel(ax, chart)
        if chart.outcome is not None:
            ax.set_title(f"earns {chart.outcome:g}", fontsize=9.5, loc="right", color=RED)
    for (ax,) in axes[::cols]:
        ax.set_ylabel("quantile level", color=GREY)
    assert image is not None
    bar = figure.colorbar(image, ax=[ax for (ax,) in axes], extend="both", pad=0.02)
    bar.set_label("predicted return", color=GREY)
    figure.suptitle(f"Every quantile along fixed responses, step {step}", fontsize=13, fontweight="bold")
    return figure


def head_disagreement(charts: list[FanData], step: int) -> Figure:
    """Draw each head's mean and 5-95 % band, and below it the spread between heads, a panel per response.

    The spread is the standard deviation over heads of their means, and of their 5 % and 95 % quantiles.
    Raises ValueError when no response has a token.
    """
    charts = drawable(charts)
    figure, axes, cols = panels(charts, height=4.1, strips=2)
    for (above, below), chart in zip(axes, charts, strict=True):
        _heads_panel(above, chart)
        _spread_panel(below, chart)
        name_panel(above, chart)
    for above, below in axes[::cols]:
        above.set_ylabel("return", color=GREY)
        below.set_ylabel("sd over heads", color=GREY)
    axes[0][1].set_ylim(bottom=0)
    figure.suptitle(f"Where the heads disagree, step {step}", fontsize=13, fontweight="bold")
    legend_below(figure, chain(*axes))
    return figure


def fan_over_training(history: list[tuple[int, list[FanData]]]) -> Figure:
    """Draw the fans of a few fixed responses (rows) at up to six evenly spaced steps (columns).

    Args:
      history: (step, the responses' charts) of every observation, by step.

    Raises:
      ValueError: no response has a token.
    """
    from matplotlib.figure import Figure

    chosen = [(step, drawable(charts)) for step, charts in evenly(history, MAX_STEPS)]
    rows, cols = len(chosen[-1][1]), len(chosen)
    figure = Figure(figsize=(2.5 * cols + 1.0, 2.5 * rows + 0.9), dpi=100, layout="constrained")
    grid = figure.subplots(rows, cols, sharey=True, squeeze=False)
    for column, (step, charts) in zip(grid.T, chosen, strict=True):
        for ax, chart in zip(column, charts, strict=True):
            draw_fan(ax, chart, labels=_NARROW_LABELS)
        column[0].set_title(f"step {step}", fontsize=10.5)
    for ax, chart in zip(grid[:, 0], chosen[-1][1], strict=True):
        title = " ".join(chart.title.split())  # cut at the start: the end says which answer it is
        ax.set_ylabel(printable(title if len(title) <= 28 else f"\u2026{title[-27:]}"), fontsize=9.5)
    figure.supylabel("return", color=GREY, fontsize=10)
    figure.suptitle("Value distribution along fixed responses over training", fontsize=13, fontweight="bold")
    legend_below(figure, grid[:, -1])
    return figure


def evenly(history: list[tuple[int, T]], most: int) -> list[tuple[int, T]]:
    """Return at most ``most`` entries of ``history``, at steps that are as evenly spaced as possible.

    The first and the newest entry are always among them.
    """
    wanted = np.linspace(history[0][0], history[-1][0], most)
    steps = np.array([step for step, _ in history])
    return [history[i] for i in sorted({int(np.abs(steps - at).argmin()) for at in wanted})]


def _heads_panel(ax: Axes, chart: FanData) -> None:
    x = np.arange(len(chart.tokens))
    heads = np.sort(np.asarray(chart.heads, dtype=float), axis=-1)
    low, high = (at_level(heads, chart.levels, level) for level in (0.05, 0.95))
    wide, marker = (x, None) if len(x) > 1 else (np.array([-0.3, 0.3]), "o")
    for h in range(heads.shape[1]):
        colour, line = _HEAD_COLOURS[h % len(_HEAD_COLOURS)], _HEAD_LINES[h % len(_HEAD_LINES)]
        ax.fill_between(wide, low[:, h], high[:, h], color=colour, alpha=0.4 / heads.shape[1], linewidth=0)
        for edge in (low, high):
            ax.plot(x, edge[:, h], color=colour, linestyle=line, linewidth=0.8, marker=marker)
        name = f"head {h + 1}, mean and 5-95 %" if h < _MAX_NAMED else None
        ax.plot(x, heads[:, h].mean(-1), color=colour, linestyle=line, linewidth=2, marker=marker, label=name)
    if chart.outcome is not None:
        ax.axhline(chart.outcome, color=RED, linestyle="--", linewidth=1.2, label="observed outcome")
    ax.set_xticks([])  # the panel below has the tokens as labels
    ax.set_xlim(-0.5, max(len(x) - 0.5, 0.5))
    tidy(ax)


def _spread_panel(ax: Axes, chart: FanData) -> None:
    """Draw the bars whose average over a batch is the metric critic/head_disagreement, and the spread of the tails."""
    x = np.arange(len(chart.tokens))
    heads = np.sort(np.asarray(chart.heads, dtype=float), axis=-1)
    ax.bar(x, heads.mean(-1).std(-1), width=0.7, color=BLUE, alpha=0.55, label="sd of the means")
    for level, mark in ((0.05, "v"), (0.95, "^")):
        spread = at_level(heads, chart.levels, level).std(-1)
        label = f"sd of the {level:.0%} quantiles"
        ax.plot(x, spread, linestyle="", marker=mark, markersize=4, color=GREY, label=label)
    token_ticks(ax, chart.tokens)
    tidy(ax)


def _edges(levels: np.ndarray) -> np.ndarray:
    """Return the boundaries [M + 1] between the colours of neighbouring quantile levels."""
    inner = (levels[1:] + levels[:-1]) / 2
    return np.concatenate([[0.0], inner, [1.0]])
