"""Pictures of the critic: its value distribution along a response, and its calibration.

In shapes, ``T`` is response tokens, ``H`` critic heads and ``M`` quantiles. More pictures: ``critic_figures.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, RED, GREY = "#2563a8", "#d9780f", "#b3261e", "#5f6368"
_MAX_PANELS = 6
_MAX_LABELS = 60
_BLANKS = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u2192"})  # visible characters for blanks
_SHORT = 14  # responses of at most so many tokens are drawn side by side, three in a row


@dataclass
class FanData:
    """One response: its tokens, and the return that every head of the critic predicts at each token."""

    title: str
    tokens: list[str]  # [T]
    levels: np.ndarray  # [M], ascending in [0, 1]
    heads: np.ndarray  # [T, H, M]
    outcome: float | None  # the observed return, if there is one

    @property
    def quantiles(self) -> np.ndarray:
        """Return the ensemble's quantiles [T, M]: the mean over heads of their sorted atoms."""
        return np.sort(np.asarray(self.heads, dtype=float), axis=-1).mean(axis=1)


def fan_chart(charts: list[FanData], step: int) -> Figure:
    """Draw the 5-95 % and 25-75 % bands, the median, the mean and the observed outcome, a panel per response.

    Raises ValueError when no response has a token.
    """
    charts = drawable(charts)
    figure, axes, cols = panels(charts, height=3.1)
    for (ax,), chart in zip(axes, charts, strict=True):
        draw_fan(ax, chart)
        name_panel(ax, chart)
    for (ax,) in axes[::cols]:
        ax.set_ylabel("return", color=GREY)
    figure.suptitle(f"Value distribution along fixed responses, step {step}", fontsize=13, fontweight="bold")
    legend_below(figure, (ax for (ax,) in axes))
    return figure


def calibration_plot(coverage: dict[float, float], step: int | None = None) -> Figure:
    """Draw the share of returns at or below a predicted quantile over the quantile's level; the diagonal is ideal.

    Args:
      coverage: that share, by level.
      step: named in the title.
    """
    from matplotlib.figure import Figure

    levels = sorted(coverage)
    observed = [coverage[level] for level in levels]
    figure = Figure(figsize=(5.2, 5.2), dpi=120, layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
    ax.fill_between(levels, levels, observed, color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(levels, observed, color=BLUE, marker="o", markersize=5, linewidth=2, label="critic")
    gap = float(np.mean(np.abs(np.subtract(observed, levels))))
    title = "Quantile calibration" + ("" if step is None else f", step {step}")
    ax.set_title(f"{title}\nmean distance from the diagonal {gap:.3f}", fontsize=12)
    ax.set_xlabel("predicted level")
    ax.set_ylabel("observed coverage")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    ax.legend(frameon=False, loc="upper left")
    tidy(ax)
    return figure


def drawable(charts: list[FanData]) -> list[FanData]:
    """Return the first six responses that have a token. Raises ValueError when there is none."""
    with_tokens = [c for c in charts if c.tokens][:_MAX_PANELS]
    if not with_tokens:
        raise ValueError("a picture of responses needs one of at least one token")
    return with_tokens


def panels(charts: list[FanData], height: float, strips: int = 1) -> tuple[Figure, list[list[Axes]], int]:
    """Return an empty figure, the axes of each response, and the number of responses in a row.

    Args:
      charts: the responses.
      height: of a response's panel, in inches.
      strips: axes per response, one below the other. The first is the tallest. The n-th strips of all responses share
        their y axis.
    """
    from matplotlib.figure import Figure

    longest = max(len(c.tokens) for c in charts)
    cols = min(3, len(charts)) if longest <= _SHORT else 1
    rows = math.ceil(len(charts) / cols)
    width = (3.9 * cols + 0.8) if cols > 1 else min(16.0, max(7.0, 2.0 + 0.24 * longest))
    figure = Figure(figsize=(width, height * rows + 0.9), dpi=120, layout="constrained")
    grid = figure.subplots(rows * strips, cols, squeeze=False, height_ratios=([2.4] + [1.0] * (strips - 1)) * rows)
    axes: list[list[Axes]] = []
    for i in range(rows * cols):
        panel = list(grid[i // cols * strips : (i // cols + 1) * strips, i % cols])
        if i >= len(charts):
            for ax in panel:
                ax.remove()
            continue
        axes.append(panel)
        for ax, first in zip(panel, axes[0], strict=True):
            if ax is not first:
                ax.sharey(first)
            ax.tick_params(labelleft=i % cols == 0, labelbottom=ax is panel[-1])
    return figure, axes, cols


def draw_fan(ax: Axes, chart: FanData, labels: int = _MAX_LABELS) -> None:
    """Draw one response's bands, median, mean and outcome, with at most ``labels`` tokens named."""
    x = np.arange(len(chart.tokens))
    ordered = chart.quantiles
    q5, q25, q50, q75, q95 = (at_level(ordered, chart.levels, level) for level in (0.05, 0.25, 0.5, 0.75, 0.95))
    wide = x if len(x) > 1 else np.array([-0.3, 0.3])  # the band of a single token needs a width
    ax.fill_between(wide, q5, q95, color=BLUE, alpha=0.14, linewidth=0, label="5-95 %")
    ax.fill_between(wide, q25, q75, color=BLUE, alpha=0.30, linewidth=0, label="25-75 %")
    marker = "o" if len(x) <= _SHORT else None
    ax.plot(x, q50, color=BLUE, linewidth=2, marker=marker, markersize=3.5, label="median")
    ax.plot(x, ordered.mean(axis=1), color=ORANGE, linewidth=1.6, label="mean")
    if chart.outcome is not None:
        ax.axhline(chart.outcome, color=RED, linestyle="--", linewidth=1.4, label="observed outcome")
    token_ticks(ax, chart.tokens, labels)
    tidy(ax)


def name_panel(ax: Axes, chart: FanData) -> None:
    """Write the response's title above its panel."""
    title = shorten(" ".join(chart.title.split()), 44 if len(chart.tokens) <= _SHORT else 100)
    ax.set_title(printable(title), fontsize=10.5, loc="left")


def legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    """Draw one legend below all panels, with every label once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    rows = math.ceil(len(entries) / min(5, figure.get_figwidth() // 2.1))  # the longest label is 2.1 inches wide
    cols = math.ceil(len(entries) / rows)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=cols, frameon=False, fontsize=9)


def at_level(ordered: np.ndarray, levels: np.ndarray, level: float) -> np.ndarray:
    """Return the quantile at ``level`` for each row of ``ordered`` [..., M], interpolated between ``levels`` [M]."""
    return np.apply_along_axis(lambda row: np.interp(level, levels, row), -1, ordered)


def token_ticks(ax: Axes, tokens: list[str], most: int = _MAX_LABELS) -> None:
    """Label the x axis with the tokens; with more than ``most`` tokens, with every k-th one."""
    every = math.ceil(len(tokens) / most)
    at = range(0, len(tokens), every)
    labels = [printable(shorten(tokens[i].translate(_BLANKS), 10)) for i in at]
    upright = max((len(label) for label in labels), default=0) > 3
    ax.set_xticks(list(at), labels, fontsize=9, family="monospace", rotation=90 if upright else 0)
    ax.set_xlim(-0.5, max(len(tokens) - 0.5, 0.5))


def tidy(ax: Axes) -> None:
    """Give a panel its grid, and remove its top and right border."""
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, colors="#3c4043")


def printable(text: str) -> str:
    """Return the text for matplotlib: ``$`` is escaped, and characters that the font lacks become a box."""
    return "".join(c if _has_glyph(c) else "\u25a1" for c in text).replace("$", r"\$")


def _has_glyph(char: str) -> bool:
    from matplotlib import font_manager

    font: Any = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    return font.get_char_index(ord(char)) != 0


def shorten(text: str, limit: int) -> str:
    """Cut the text to ``limit`` characters; a cut text ends in an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"
