"""What a sweep leaves on disk, and reading it back.

<sweep>/sweep.json                 the grid, the seeds, the base config: written before anything starts
<sweep>/trials/<arm>-seed<k>/      a run directory like any other (config.yaml, metrics.jsonl, summary.json),
                                   and trial.json: how the trial went
<sweep>/base-models/               one per seed, shared by all arms
<sweep>/report.html, report.md
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self

from dvpo_service.errors import DataError
from dvpo_service.host.secrets import mask_override, mask_uri
from dvpo_service.runs.step_file import read_metrics
from tune_sweeps.grid import Arm, Grid

Status = Literal["waiting", "running", "done", "failed"]


@dataclass
class TrialState:
    """``trial.json``."""

    arm: str
    seed: int
    status: Status = "waiting"
    attempts: int = 0
    seconds: float = 0.0  # of all attempts
    start_seconds: float = 0.0  # of the last attempt, until its first step began
    error: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)  # the arm's

    def save(self, folder: Path) -> None:
        beside = folder / "trial.json.tmp"
        beside.write_text(json.dumps(asdict(self), indent=2) + "\n")
        beside.replace(folder / "trial.json")

    @classmethod
    def load(cls, folder: Path) -> TrialState | None:
        """None where the trial has not begun."""
        path = folder / "trial.json"
        return cls(**json.loads(path.read_text())) if path.is_file() else None


@dataclass(frozen=True)
class Trial:
    """One arm with one seed. ``metrics``: a dict a step, as in metrics.jsonl (null where not finite)."""

    state: TrialState
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)  # summary.json of a finished run; {} before
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    folder: Path
    grid: Grid
    config: str  # name of the base config
    overrides: list[str]
    seeds: list[int]
    mlflow_run_id: str | None
    mlflow_uri: str | None
    trials: list[Trial] = field(default_factory=list)
    grid_source: str = ""  # what was given as --grid

    def masked(self) -> Self:
        """Without secrets: what files, reports and MLflow get."""
        uri = mask_uri(self.mlflow_uri) if self.mlflow_uri else None
        return replace(self, overrides=[mask_override(o) for o in self.overrides], mlflow_uri=uri)


def trial_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def save_sweep(sweep: Sweep) -> None:
    """Write ``sweep.json``, without secrets."""
    sweep = sweep.masked()
    sweep.folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "grid": asdict(sweep.grid),
        "config": sweep.config,
        "overrides": sweep.overrides,
        "seeds": sweep.seeds,
        "mlflow_run_id": sweep.mlflow_run_id,
        "mlflow_uri": sweep.mlflow_uri,
        "grid_source": sweep.grid_source,
    }
    (sweep.folder / "sweep.json").write_text(json.dumps(tree, indent=2) + "\n")


def read_sweep(folder: Path) -> Sweep:
    """The sweep with every trial that has begun. Raises DataError where ``folder`` holds none, or a damaged one."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise DataError(f"{folder}: no sweep.json there; give the folder that `dvpo sweep` printed")
    try:
        tree = json.loads(path.read_text())
        grid = tree.pop("grid")
        grid["arms"] = tuple(Arm(**a) for a in grid["arms"])
        sweep = Sweep(folder=folder, grid=Grid(**grid), **tree)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a sweep's record ({error})") from error
    for trial in sorted((folder / "trials").glob("*/trial.json")):
        sweep.trials.append(_read_trial(trial.parent))
    if sweep.grid.arms:
        order = {(arm.name, seed): i for i, (arm, seed) in enumerate(product(sweep.grid.arms, sweep.seeds))}
        sweep.trials.sort(key=lambda t: order.get((t.state.arm, t.state.seed), len(order)))
        return sweep
    drawn = {t.state.arm: Arm(t.state.arm, t.state.overrides) for t in sweep.trials}
    return replace(sweep, grid=replace(sweep.grid, arms=tuple(drawn.values())))


def _read_trial(folder: Path) -> Trial:
    summary = folder / "summary.json"
    try:
        state = TrialState.load(folder)
        assert state is not None
        told = json.loads(summary.read_text()) if summary.is_file() else {}
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder}: trial.json or summary.json is damaged ({error}); remove the folder") from error
    return Trial(state, folder, told, read_metrics(folder / "metrics.jsonl"))
