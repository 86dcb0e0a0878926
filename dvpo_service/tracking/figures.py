"""Pictures of the critic: its value distribution along a response, and its calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _RED, _GREY = "#2563a8", "#d9780f", "#b3261e", "#5f6368"
_MAX_PANELS = 6
_MAX_LABELS = 60
_BLANKS = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u2192"})  # made visible
_SHORT = 14  # responses up to so many tokens stand side by side, three in a row


@dataclass
class FanData:
    """One response: its tokens, and the critic's quantiles of the return at each of them."""

    title: str
    tokens: list[str]  # [T]
    levels: np.ndarray  # [M], ascending in [0, 1]
    quantiles: np.ndarray  # [T, M]
    outcome: float | None  # the observed return, where there is one


def fan_chart(charts: list[FanData], step: int) -> Figure:
    """A panel per response: 5-95 % and 25-75 % bands, median, mean and the observed outcome."""
    from matplotlib.figure import Figure

    charts = [c for c in charts if c.tokens][:_MAX_PANELS]
    if not charts:
        raise ValueError("a fan chart needs a response of at least one token")
    longest = max(len(c.tokens) for c in charts)
    cols = min(3, len(charts)) if longest <= _SHORT else 1
    rows = math.ceil(len(charts) / cols)
    width = (3.9 * cols + 0.8) if cols > 1 else min(16.0, max(7.0, 2.0 + 0.24 * longest))
    figure = Figure(figsize=(width, 3.1 * rows + 0.9), dpi=120, layout="constrained")
    axes = figure.subplots(rows, cols, sharey=True, squeeze=False).ravel()
    for ax, chart in zip(axes, charts, strict=False):
        _fan_panel(ax, chart)
    for ax in axes[len(charts) :]:
        ax.remove()
    for ax in axes[: len(charts) : cols]:
        ax.set_ylabel("return", color=_GREY)
    figure.suptitle(f"Value distribution along fixed responses, step {step}", fontsize=13, fontweight="bold")
    # The panel that shows an outcome has every entry.
    full = next((i for i, c in enumerate(charts) if c.outcome is not None), 0)
    entries = axes[full].get_legend_handles_labels()
    figure.legend(
        *entries,
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    return figure


def calibration_plot(coverage: dict[float, float], step: int | None = None) -> Figure:
    """Predicted level against the share of returns at or below that quantile; the diagonal is right."""
    from matplotlib.figure import Figure

    levels = sorted(coverage)
    observed = [coverage[level] for level in levels]
    figure = Figure(figsize=(5.2, 5.2), dpi=120, layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1.2, label="calibrated")
    ax.fill_between(levels, levels, observed, color=_BLUE, alpha=0.15, linewidth=0)
    ax.plot(levels, observed, color=_BLUE, marker="o", markersize=5, linewidth=2, label="critic")
    gap = float(np.mean(np.abs(np.subtract(observed, levels))))
    title = "Quantile calibration" + ("" if step is None else f", step {step}")
    ax.set_title(f"{title}\nmean distance from the diagonal {gap:.3f}", fontsize=12)
    ax.set_xlabel("predicted level")
    ax.set_ylabel("observed coverage")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    ax.legend(frameon=False, loc="upper left")
    _tidy(ax)
    return figure


def _fan_panel(ax: Axes, chart: FanData) -> None:
    x = np.arange(len(chart.tokens))
    # An untrained critic's quantiles may cross; a band needs them in order.
    ordered = np.sort(np.asarray(chart.quantiles, dtype=float), axis=1)
    q5, q25, q50, q75, q95 = (_at(ordered, chart.levels, level) for level in (0.05, 0.25, 0.5, 0.75, 0.95))
    wide = x if len(x) > 1 else np.array([-0.3, 0.3])  # a band of a single token has a width too
    ax.fill_between(wide, q5, q95, color=_BLUE, alpha=0.14, linewidth=0, label="5-95 %")
    ax.fill_between(wide, q25, q75, color=_BLUE, alpha=0.30, linewidth=0, label="25-75 %")
    marker = "o" if len(x) <= _SHORT else None
    ax.plot(x, q50, color=_BLUE, linewidth=2, marker=marker, markersize=3.5, label="median")
    ax.plot(x, ordered.mean(axis=1), color=_ORANGE, linewidth=1.6, label="mean")
    if chart.outcome is not None:
        ax.axhline(chart.outcome, color=_RED, linestyle="--", linewidth=1.4, label="observed outcome")
    title = _shorten(" ".join(chart.title.split()), 44 if len(x) <= _SHORT else 100)
    ax.set_title(_printable(title), fontsize=10.5, loc="left")
    _token_ticks(ax, chart.tokens)
    _tidy(ax)


def _at(ordered: np.ndarray, levels: np.ndarray, level: float) -> np.ndarray:
    """The quantile at ``level`` for each token, between the predicted levels."""
    return np.array([np.interp(level, levels, row) for row in ordered])


def _token_ticks(ax: Axes, tokens: list[str]) -> None:
    every = math.ceil(len(tokens) / _MAX_LABELS)
    at = range(0, len(tokens), every)
    labels = [_printable(_shorten(tokens[i].translate(_BLANKS), 10)) for i in at]
    upright = max((len(label) for label in labels), default=0) > 3
    ax.set_xticks(list(at), labels, fontsize=9, family="monospace", rotation=90 if upright else 0)
    ax.set_xlim(-0.5, max(len(tokens) - 0.5, 0.5))


def _tidy(ax: Axes) -> None:
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, colors="#3c4043")


def _printable(text: str) -> str:
    """``$`` kept from being read as maths, and no character that the font lacks."""
    return "".join(c if _has_glyph(c) else "\u25a1" for c in text).replace("$", r"\$")


def _has_glyph(char: str) -> bool:
    from matplotlib import font_manager

    font: Any = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    return font.get_char_index(ord(char)) != 0


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"
