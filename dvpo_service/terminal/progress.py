"""A progress bar for work with a known number of steps: the warm start, an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from dvpo_service.terminal.console import can_redraw, make_bar, make_console, plain

_PLAIN_LINES = 20


class Bar:
    """A progress bar, or plain lines without a terminal; ``progress`` creates it.

    Args:
      description: named before the count.
      total: the number of steps.
      console: where plain lines are printed.
      bar: the bar to update; None for plain lines.
    """

    def __init__(self, description: str, total: int, console: Console, bar: Progress | None) -> None:
        self._description, self._total, self._console, self._bar = description, total, console, bar
        self._task = bar.add_task(description, total=total, numbers="") if bar else None
        self._every = max(1, math.ceil(total / _PLAIN_LINES))
        self._last_printed = 0

    def stage(self, text: str) -> None:
        """Say what is done before the first step, such as ``starting engines``; an empty text ends it."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._description}: {text}" if text else self._description)
        elif text:
            plain(self._console, text)

    def update(self, done: int, **numbers: float) -> None:
        """Show that ``done`` steps are done, with what was measured: ``update(20, loss=1.2, accuracy=0.4)``."""
        text = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, numbers=text)
        elif done >= self._total > self._last_printed or done - self._last_printed >= self._every:
            self._last_printed = done
            plain(self._console, f"{self._description} {done}/{self._total} {text}".rstrip())


@contextmanager
def progress(description: str, total: int, console: Console | None = None) -> Iterator[Bar]:
    """Yield a bar that shows the time left; without a terminal, it prints about 20 plain lines."""
    console = console or make_console()
    if not can_redraw(console):
        yield Bar(description, total, console, None)
        return
    with make_bar(console) as bar:
        yield Bar(description, total, console, bar)
