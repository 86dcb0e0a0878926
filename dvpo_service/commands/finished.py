"""A run that is finished already: what the same command says and does, before anything heavy is imported."""

from __future__ import annotations

import json
from typing import Any

from dvpo_service.config import Config
from dvpo_service.errors import CheckpointError
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.lock import locked
from dvpo_service.runs.settings import changes, recorded, settings_of
from dvpo_service.runs.storage import StoragePath
from dvpo_service.tracking.spool import UNSENT


def finished(config: Config, run_dir: StoragePath) -> dict[str, Any] | None:
    """Return the summary of the run in ``run_dir`` if nothing of this config is left to do there, else None.

    More steps (``trainer.num_steps``) are left to do, as is a new start (``trainer.resume=never``).

    Raises:
      CheckpointError: the run is finished, and this config has other settings, which would not be used.
    """
    if config.trainer.resume == "never":
        return None
    summary, exported = _read(run_dir / "summary.json"), _read(run_dir / "policy" / "export.json")
    steps = summary.get("steps")
    if not isinstance(steps, int) or exported.get("step") != steps or config.trainer.num_steps > steps:
        return None
    changed = changes(recorded(run_dir) or {}, settings_of(config))
    if changed:
        raise CheckpointError(
            f"{run_dir} is already finished at step {steps}; nothing was started, since these settings would not be "
            f"used: {'; '.join(changed)}. Give another --run-dir for another run, trainer.num_steps above {steps} to "
            "continue with them, or trainer.resume=never to start over"
        )
    return summary


def say_finished(config: Config, run_dir: StoragePath, summary: dict[str, Any]) -> str:
    """Return the line for a run that is finished. First send MLflow what an outage kept back, if anything waits."""
    run = RunDir(run_dir)
    line = f"{run_dir} is already finished at step {summary['steps']}: nothing was started. Its figures are in "
    line += f"{run_dir / 'summary.json'}; to train on give trainer.num_steps={2 * summary['steps']} or another number"
    if not (config.tracking.mlflow and (run.local / UNSENT).is_dir()):
        return line
    from dvpo_service.tracking.tracker import Tracker  # imports MLflow

    with locked(run.local):
        run_id = summary.get("where", {}).get("mlflow_run_id") or None
        Tracker(run.local, config, run_id=run_id, resume_step=summary["steps"] + 1).finish("FINISHED", summary)
    return f"{line}. MLflow was sent what it had not got yet"


def _read(file: StoragePath) -> dict[str, Any]:
    """Return a JSON object, {} where there is none."""
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
