"""The console that output goes to, and whether it can be redrawn."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PLAIN_WIDTH = 110


def make_console() -> Console:
    """Return a console on standard output, 110 columns wide when standard output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def can_redraw(console: Console) -> bool:
    """Return False for a pipe, a log or a dumb terminal, where plain lines are printed instead."""
    return console.is_terminal and not console.is_dumb_terminal


def make_bar(console: Console) -> Progress:
    """Return a progress bar: description, bar, count, elapsed time, time left, and the task's field ``numbers``."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=console,
        expand=True,
        # Steps can take minutes, so rich's default of 30 s would leave the speed unknown.
        speed_estimate_period=900.0,
    )


def plain(console: Console, text: str) -> None:
    """Print one line without wrapping it and without interpreting markup in it."""
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def hours(seconds: float) -> str:
    """Return a time in seconds as hours, minutes and seconds: ``1:02:03``."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
