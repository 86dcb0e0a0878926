"""The live table of the last steps, with a progress bar and the current stage."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dvpo_service.terminal.console import can_redraw, make_bar, make_console, plain

_LAST_ROWS = 12
_PLAIN_LINES = 150
_ACCURACY = re.compile(r"eval/[^/]+/(accuracy|graded)")


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Attributes:
      title: of the column.
      names: the column shows the first of these metrics that the step has.
      form: the number's format.
      drop: on a narrow terminal, columns are dropped from the highest number to the lowest; those with 0 always stay.
    """

    title: str
    names: tuple[str, ...]
    form: str
    drop: int = 0


_REWARD = _Column("reward", ("reward/mean",), ".3f")
_CLEAN = _Column("clean", ("reward/clean_mean",), ".3f", 1)
_REST = (
    _Column("critic", ("critic/dvpo_loss",), ".4f"),
    _Column("KL ref", ("policy/ref_kl",), ".1e", 3),
    _Column("KL old", ("policy/approx_kl",), ".1e", 4),
    _Column("entropy", ("policy/entropy",), ".2f", 4),
    _Column("tok/s", ("rollout/tokens_per_s",), ",.0f", 2),
    _Column("gen", ("time/generate",), ".1f", 5),
    _Column("score", ("time/score",), ".1f", 8),
    _Column("adv", ("time/advantages",), ".1f", 7),
    _Column("train", ("time/update",), ".1f", 5),
    _Column("sync", ("time/sync",), ".1f", 6),
    _Column("step s", ("time/step",), ".1f", 1),
    _Column("stale", ("rollout/staleness",), ".1f", 9),
    _Column("KL engine", ("policy/rollout_kl",), ".1e", 10),
)


class TrainingDisplay:
    """A context manager around the training loop, which shows the last steps as a table.

    Without a terminal, each step is printed as one plain line; in a long run only every k-th step, about 150 in all.

    Args:
      total: the number of steps.
      start: the number of steps already done when a run resumes.
      console: by default standard output.
    """

    def __init__(self, total: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or make_console()
        self._redraws = can_redraw(self.console)
        self._total, self._start = total, start
        self._every = max(1, math.ceil((total - start) / _PLAIN_LINES))
        self._rows: deque[tuple[int, dict[str, float]]] = deque(maxlen=_LAST_ROWS)
        self._accuracy: dict[str, float] = {}  # eval/<split>/accuracy and graded, the newest ones
        self._noisy = False  # the reward and the reward without noise have differed
        self._printed: set[str] = set()  # statuses
        self._spinner: Spinner | None = None
        self._bar = make_bar(self.console)
        self._task = self._bar.add_task("training", total=total, completed=start, numbers="")
        self._table: tuple[int, Table] | None = None  # (the console's width, the table), until the next update
        self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._redraws:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._spinner = None
        if self._redraws:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step.

        Args:
          step: the number of updates done; 0 is the evaluation before training.
          metrics: by name. A split's accuracy is shown until a newer one is given.
        """
        self._accuracy |= {k: v for k, v in metrics.items() if _ACCURACY.fullmatch(k)}
        for name in (k for k, v in metrics.items() if _ACCURACY.fullmatch(k) and math.isnan(v)):
            self.note(f"step {step}: no response of {name.split('/')[1]} could be scored, so it has no accuracy")
        if "reward/mean" in metrics:
            reward = metrics["reward/mean"]
            self._noisy |= not math.isclose(metrics.get("reward/clean_mean", reward), reward, abs_tol=1e-9)
            self._rows.append((step, {**metrics, **self._accuracy}))
            self._bar.update(self._task, completed=step)
        self._table = None
        done = step - self._start
        last = step >= self._total
        if not self._redraws and (done <= 1 or done % self._every == 0 or last):
            plain(self.console, self._line(step, {**metrics, **self._accuracy}))

    def status(self, text: str) -> None:
        """Show the current stage (``starting engines``); an empty text clears it."""
        self._spinner = Spinner("dots", text=Text(text), style="cyan") if text else None
        if not self._redraws and text and text not in self._printed:
            self._printed.add(text)  # stages that every step repeats are printed once
            plain(self.console, text)

    def note(self, text: str) -> None:
        """Print a line that stays above the table, such as a warning or a restart."""
        if self._redraws:
            self.console.print(Text(text, style="yellow"))
        else:
            plain(self.console, text)

    def _render(self) -> RenderableType:
        width = self.console.width
        if self._table is None or self._table[0] != width:
            self._table = (width, self._build(width))
        parts: list[RenderableType] = [self._table[1]] if self._rows else []
        parts.append(self._bar)
        if self._spinner:
            parts.append(self._spinner)
        return Group(*parts)

    def _columns(self) -> list[_Column]:
        splits = [
            _Column(
                f"{_short(split)} {'reward' if f'eval/{split}/graded' in self._accuracy else 'acc'}", (name,), ".3f"
            )
            for name in self._accuracy
            if name.endswith("/accuracy")
            for split in [name.split("/")[1]]
        ]
        return [_REWARD, *([_CLEAN] if self._noisy else []), *splits, *_REST]

    def _title(self, split: str) -> str:
        """Return the title of a split's accuracy: of graded rewards it is their mean."""
        return f"{_short(split)} {'reward' if f'eval/{split}/graded' in self._accuracy else 'acc'}"

    def _build(self, width: int) -> Table:
        """Return the table with the columns that fit; a column is as wide as its widest cell plus two characters."""
        columns = [c for c in self._columns() if any(_cell(c, m) != "-" for _, m in self._rows)]
        cells = {c: [_cell(c, metrics) for _, metrics in self._rows] for c in columns}
        wide = {c: 2 + max(len(c.title), *map(len, cells[c])) for c in columns}
        while sum(wide[c] for c in columns) + 6 > width and any(c.drop for c in columns):
            columns.remove(max(columns, key=lambda c: c.drop))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold cyan")
        for title in ("step", *(c.title for c in columns)):
            table.add_column(title, justify="right", no_wrap=True)
        for i, (step, _) in enumerate(self._rows):
            newest = "bold" if i == len(self._rows) - 1 else ""
            table.add_row(str(step), *(cells[c][i] for c in columns), style=newest)
        return table

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._total}"]
        for column in self._columns():
            if (cell := _cell(column, metrics)) != "-":
                parts.append(f"{column.title.replace(' ', '_')}={cell}")
        left = self._bar.tasks[self._task].time_remaining
        if left and step < self._total:
            parts.append(f"eta={left:.0f}s")
        return " ".join(parts)


def _cell(column: _Column, metrics: Mapping[str, float]) -> str:
    value = next((metrics[name] for name in column.names if name in metrics), None)
    return "-" if value is None or math.isnan(value) else format(value, column.form)


def _short(split: str) -> str:
    return split if len(split) <= 10 else split[:9] + "\u2026"
