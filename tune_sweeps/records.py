"""The files of a sweep, and how to read them back.

<sweep>/sweep.json                 the grid, the seeds, the base config: written before anything starts
<sweep>/trials/<arm>-seed<k>/      a run directory like any other (config.yaml, metrics.jsonl, summary.json),
                                   and trial.json: status, attempts and error of the trial (see ``trial_folder``)
<sweep>/base-models/               one per seed, shared by all arms
<sweep>/report.html, report.md
"""

from __future__ import annotations

import hashlib
import json
import re
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
    """Content of ``trial.json``.

    Attributes:
      seconds: duration of all attempts together.
      start_seconds: duration of the last attempt until its first step began.
      overrides: the arm's overrides.
    """

    arm: str
    seed: int
    status: Status = "waiting"
    attempts: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0
    error: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``trial.json`` into the trial's folder: the file is complete or absent at any time."""
        temporary = folder / "trial.json.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(folder / "trial.json")

    @classmethod
    def load(cls, folder: Path) -> TrialState | None:
        """Return the state in ``folder``, or None if the trial has not begun."""
        path = folder / "trial.json"
        return cls(**json.loads(path.read_text())) if path.is_file() else None


@dataclass(frozen=True)
class Trial:
    """One arm with one seed.

    Attributes:
      summary: summary.json of a finished run; empty before.
      metrics: a dict for each step, as in metrics.jsonl; None where a value is not finite.
    """

    state: TrialState
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """A sweep and the trials that have begun.

    Attributes:
      config: name or path of the base config.
      overrides: changes to the base config that all runs share.
      grid_source: what was given as ``--grid``.
    """

    folder: Path
    grid: Grid
    config: str
    overrides: list[str]
    seeds: list[int]
    mlflow_run_id: str | None
    mlflow_uri: str | None
    trials: list[Trial] = field(default_factory=list)
    grid_source: str = ""

    def masked(self) -> Self:
        """Return the sweep without secrets, for files, reports and MLflow."""
        uri = mask_uri(self.mlflow_uri) if self.mlflow_uri else None
        return replace(self, overrides=[mask_override(o) for o in self.overrides], mlflow_uri=uri)


def trial_name(arm: str, seed: int) -> str:
    """Return the name of a trial."""
    return f"{arm}-seed{seed}"


def trial_folder(arm: str, seed: int) -> str:
    """Return the name of a trial's folder: the trial's name if that can be one, else a safe one, unique by a hash."""
    name = trial_name(arm, seed)
    safe = re.sub(r"[^\w=,.+~-]", "_", name)[:150].lstrip(".")
    return name if safe == name else f"{safe}~{short_hash(name)}"


def short_hash(text: str) -> str:
    """Return eight hex digits that tell texts apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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
    """Return the sweep in ``folder`` with every trial that has begun.

    Trials are in the order of the grid and the seeds. The arms of a searched grid are those of its trials.

    Raises:
      DataError: ``folder`` holds no sweep, or a damaged one.
    """
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
    summary_file = folder / "summary.json"
    try:
        state = TrialState.load(folder)
        assert state is not None
        summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder}: trial.json or summary.json is damaged ({error}); remove the folder") from error
    return Trial(state, folder, summary, read_metrics(folder / "metrics.jsonl"))
