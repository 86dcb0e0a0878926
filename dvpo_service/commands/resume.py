"""Where a run goes on: the checkpoint it continues from, and everything brought back to it."""

from __future__ import annotations

from pathlib import Path

from dvpo_service import loop
from dvpo_service.config import Config, load_config
from dvpo_service.errors import CheckpointError
from dvpo_service.roles import Display
from dvpo_service.runs.checkpoint import Checkpoint, Checkpoints
from dvpo_service.tracking.tracker import Tracker


def resume_point(config: Config, checkpoints: Checkpoints) -> Checkpoint | None:
    if config.trainer.resume == "never":
        checkpoints.set_aside()
        return None
    found = checkpoints.latest()
    if found and found.record["state"]["step"] > config.trainer.num_steps:
        raise CheckpointError(
            f"{found.folder} is at step {found.record['state']['step']}, beyond trainer.num_steps = "
            f"{config.trainer.num_steps}; raise num_steps, choose another --run-dir, or give trainer.resume=never"
        )
    if found:
        _check_same_critic(config, checkpoints.run_dir)
    return found


def _check_same_critic(config: Config, run_dir: Path) -> None:
    """Raise CheckpointError when the run in ``run_dir`` trains another kind of critic."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        return
    before, now = load_config(str(file)).algorithm, config.algorithm
    for key in ("adv_estimator", "n_heads", "n_quantiles", "critic_hidden_dim"):
        if getattr(before, key) != getattr(now, key):
            raise CheckpointError(
                f"the checkpoints in {run_dir} are of algorithm.{key}={getattr(before, key)}, the config now has "
                f"{getattr(now, key)}; give the old value, choose another --run-dir, or give trainer.resume=never"
            )


def restore(roles: loop.Roles, resume: Checkpoint | None) -> loop.TrainState:
    if resume is None:
        return loop.TrainState()
    roles.policy.load(resume.folder / "policy")
    roles.estimator.load(resume.folder / "estimator")
    roles.stream.load_state_dict(resume.record["stream"])
    return loop.TrainState(**resume.record["state"])


def open_tracker(config: Config, run_dir: Path, resume: Checkpoint | None, display: Display) -> Tracker:
    if resume is None:
        return Tracker(run_dir, config, display=display)
    step = resume.record["state"]["step"]
    run_id = resume.record["mlflow_run_id"]
    return Tracker(run_dir, config, run_id=run_id, resume_step=step + 1, display=display)
