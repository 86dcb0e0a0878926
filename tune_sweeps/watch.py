"""What a person sees of a running sweep: a line for each event and, on a terminal, one table of all trials."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ray.tune import Callback
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from dvpo_service.errors import describe_error
from dvpo_service.terminal.console import can_redraw, hours, make_console, plain

_RUNNING, _ENDED = "RUNNING", ("TERMINATED", "ERROR")


class SweepWatch(Callback):
    """Prints the events of a sweep's trials, in place of Tune's own boxes.

    Args:
      console: by default standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._live: Live | None = None
        self._began: dict[str, float] = {}  # when a trial started last, by its id
        self._figures: dict[str, Mapping[str, Any]] = {}  # a trial's newest report, by its id

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks, to continue a sweep; a terminal does not travel."""
        return self.__dict__ | {"_console": None, "_live": None}

    @property
    def console(self) -> Console:
        """The console that is printed to."""
        self._console = self._console or make_console()
        return self._console

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._began.setdefault(trial.trial_id, time.time())
        ended = _count(trials, *_ENDED)
        self._say(f"{trial}: started ({_count(trials, _RUNNING)} running, {ended} of {len(trials)} ended)")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._figures[trial.trial_id] = result
        if self._live is None and not can_redraw(self.console):
            self._say(f"{trial}: {_words(result)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        took = hours(time.time() - self._began.get(trial.trial_id, time.time()))
        self._say(f"{trial}: done in {took}: {_words(self._figures.get(trial.trial_id, {}))}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"{trial}: failed, and is tried again from its checkpoint{_why(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"{trial}: failed for good{_why(trial)}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not can_redraw(self.console):
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        self._live.update(self._table(trials), refresh=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if self._live is not None:
            self._live.update(self._table(trials), refresh=True)
            self._live.stop()
            self._live = None

    def _say(self, text: str) -> None:
        plain(self.console, text)

    def _table(self, trials: Iterable[Any]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
        table.add_column("trial", overflow="fold")
        for title in ("state", "step", "accuracy", "reward", "time"):
            table.add_column(title, justify="right", no_wrap=True)
        for trial in trials:
            figures = self._figures.get(trial.trial_id, {})
            began = self._began.get(trial.trial_id)
            took = hours(time.time() - began) if began and trial.status == _RUNNING else "-"
            cells = [_number(figures.get("accuracy")), _number(figures.get("reward"))]
            table.add_row(str(trial), trial.status.lower(), str(figures.get("step", "-")), *cells, took)
        return table


def _words(figures: Mapping[str, Any]) -> str:
    """Return a trial's newest report as text."""
    if "step" not in figures:
        return "no evaluation"
    return f"step {figures['step']}, accuracy {_number(figures.get('accuracy'))}"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else "-"


def _count(trials: Iterable[Any], *states: str) -> int:
    return sum(trial.status in states for trial in trials)


def _why(trial: Any) -> str:
    """Return the reason of a trial's last failure, if Tune has kept it."""
    error = trial.get_error()
    return f": {describe_error(getattr(error, 'cause', None) or error)}" if error else ""
