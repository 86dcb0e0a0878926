"""Where the output goes, and whether it can be redrawn."""

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
    """Standard output; a fixed width where there is no terminal to ask."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def can_redraw(console: Console) -> bool:
    """False in a pipe, a log or a dumb terminal: then plain lines are printed."""
    return console.is_terminal and not console.is_dumb_terminal


def make_bar(console: Console) -> Progress:
    """Description, bar, count, time gone and time left; ``{task.fields[numbers]}`` at the end."""
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
        # Steps can take minutes: the speed over the last half minute would be unknown.
        speed_estimate_period=900.0,
    )


def plain(console: Console, text: str) -> None:
    """One line that is never wrapped or styled, whatever it holds."""
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def hours(seconds: float) -> str:
    """``1:02:03``."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
