"""A sweep prints a line for each event, and one table on a terminal."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

from rich.console import Console

from tune_sweeps.watch import SweepWatch


@dataclass
class Trial:
    trial_id: str
    status: str = "PENDING"
    error: Exception | None = None

    def __str__(self) -> str:
        return f"arm-seed{self.trial_id}"

    def get_error(self) -> Exception | None:
        return self.error


def sweep(watch: SweepWatch) -> None:
    """Two trials: one fails once and is done, the other fails for good."""
    trials = [Trial("0"), Trial("1")]
    for trial in trials:
        trial.status = "RUNNING"
        watch.on_trial_start(1, trials, trial)
        watch.on_step_end(1, trials)
    first, second = trials
    watch.on_trial_result(2, trials, first, {"step": 5, "accuracy": 0.25, "reward": float("nan")})
    first.error = RuntimeError("a rank\nis gone")
    watch.on_trial_recover(3, trials, first)
    watch.on_trial_start(4, trials, first)
    watch.on_trial_result(5, trials, first, {"step": 10, "accuracy": 0.5, "reward": 0.4})
    first.status = "TERMINATED"
    watch.on_trial_complete(6, trials, first)
    second.status = "ERROR"
    watch.on_trial_error(7, trials, second)
    watch.on_step_end(8, trials)
    watch.on_experiment_end(trials)


def test_without_a_terminal_there_is_a_line_for_each_event() -> None:
    console = Console(file=io.StringIO(), width=110)
    sweep(SweepWatch(console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[:4] == [
        "arm-seed0: started (1 running, 0 of 2 ended)",
        "arm-seed1: started (2 running, 0 of 2 ended)",
        "arm-seed0: step 5, accuracy 0.250",
        "arm-seed0: failed, and is tried again from its checkpoint: RuntimeError: a rank is gone",
    ]
    assert lines[-2].startswith("arm-seed0: done in 0:00:0")
    assert lines[-2].endswith("step 10, accuracy 0.500")
    assert lines[-1] == "arm-seed1: failed for good"
    assert len(lines) == 8


def test_on_a_terminal_there_is_one_table() -> None:
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    watch = SweepWatch(console)
    sweep(watch)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("accuracy 0.250") == 0, "the table has it"
    last = shown[shown.rindex("trial") :]
    assert "terminated" in last
    assert "0.500" in last
    assert "nan" not in shown


def test_it_travels_with_a_sweep_that_is_continued() -> None:
    watch = SweepWatch(Console(file=io.StringIO(), width=110, force_terminal=True))
    watch.on_step_end(1, [Trial("0")])
    again = copy.copy(watch)  # by __getstate__, as pickle does
    watch.on_experiment_end([])
    again._console = Console(file=io.StringIO(), width=110)
    sweep(again)
