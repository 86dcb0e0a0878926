"""Continue a run: find the checkpoint to continue from, and restore everything from it."""

from __future__ import annotations

from pathlib import Path

from dvpo_service import loop
from dvpo_service.commands.identity import check_identity, identity
from dvpo_service.config import Config
from dvpo_service.data.splits import Data
from dvpo_service.errors import CheckpointError
from dvpo_service.roles import Display
from dvpo_service.runs.checkpoint import Checkpoint, Checkpoints
from dvpo_service.tracking.tracker import Tracker


def resume_point(config: Config, data: Data, checkpoints: Checkpoints) -> Checkpoint | None:
    """Return the checkpoint to continue from, or None for a run that starts anew.

    With ``trainer.resume=never``, older checkpoints are set aside. ``checkpoints`` records what the run may not change.

    Raises:
      CheckpointError: the checkpoint is beyond ``trainer.num_steps``, or is of a run with another model, other data,
        another kind of critic or another reward.
    """
    checkpoints.identity = identity(config, data)
    if config.trainer.resume == "never":
        checkpoints.set_aside()
        return None
    checkpoint = checkpoints.latest()
    if checkpoint and checkpoint.record["state"]["step"] > config.trainer.num_steps:
        raise CheckpointError(
            f"{checkpoint.folder} is at step {checkpoint.record['state']['step']}, beyond trainer.num_steps = "
            f"{config.trainer.num_steps}; raise num_steps, choose another --run-dir, or give trainer.resume=never"
        )
    if checkpoint:
        # A checkpoint of a version that recorded no identity is continued as it is.
        check_identity(checkpoint.record.get("identity", {}), checkpoints.identity, str(checkpoint.folder))
    return checkpoint


def restore(roles: loop.Roles, resume: Checkpoint | None) -> loop.TrainState:
    """Load policy, estimator and stream from the checkpoint, and return the loop's state; a new state for None."""
    if resume is None:
        return loop.TrainState()
    roles.policy.load(resume.folder / "policy")
    roles.estimator.load(resume.folder / "estimator")
    roles.stream.load_state_dict(resume.record["stream"])
    return loop.TrainState(**resume.record["state"])


def open_tracker(config: Config, run_dir: Path, resume: Checkpoint | None, display: Display) -> Tracker:
    """Return a tracker that starts a new MLflow run, or continues the run of the checkpoint."""
    if resume is None:
        return Tracker(run_dir, config, display=display)
    step = resume.record["state"]["step"]
    run_id = resume.record["mlflow_run_id"]
    return Tracker(run_dir, config, run_id=run_id, resume_step=step + 1, display=display)
