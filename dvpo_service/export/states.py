"""Find the newest state of a run: an export or a checkpoint. Reads small files only, and imports nothing heavy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvpo_service.config import Config, load_config
from dvpo_service.errors import CheckpointError
from dvpo_service.runs.integrity import STATE_FILE
from dvpo_service.runs.settings import CONFIG_FILE
from dvpo_service.runs.storage import StoragePath

EXPORT_FILE, POLICY = "export.json", "policy"


def newest(source: Path) -> tuple[int, Path]:
    """Return the step and the folder (an export or a checkpoint) of the newest state in ``source``.

    No weights are read, so a server can call this often while a run goes on.

    Args:
      source: a run directory, a checkpoint (``RUN/checkpoints/step-000075``), or an export.

    Raises:
      CheckpointError: there is no state.
    """
    if state := _state_in(source):
        return state
    folders = [*_checkpoints_in(source)[-1:], source / POLICY]
    states = [state for folder in folders if (state := _state_in(folder))]
    if not states:
        raise nothing_in(source)
    return max(reversed(states), key=lambda state: state[0])  # at equal steps policy/: it is exported already


def nothing_in(source: StoragePath) -> CheckpointError:
    """Return the error that says that ``source`` is not there, or holds no state to export."""
    if isinstance(source, Path) and not source.exists():
        return CheckpointError(f"{source}: there is no such folder. {_nearest(source)}")
    return CheckpointError(
        f"{source} holds nothing to export: no whole checkpoint in checkpoints/, no finished {POLICY}/, and no "
        f"{EXPORT_FILE}; give a run directory, one of its checkpoints (RUN/checkpoints/step-NNNNNN), or an export"
    )


def _nearest(missing: Path) -> str:
    """Return what is near a path that is not there: for a checkpoint those of its run, else the runs beside it."""
    above = missing.parent
    while not above.is_dir():
        missing, above = above, above.parent
    place = above.absolute()
    found = sorted(child for child in above.iterdir() if child.is_dir() and _holds_a_state(child))
    if not found:
        return f"{place} holds no run, checkpoint or export"
    close = difflib.get_close_matches(missing.name, [f.name for f in found], n=1)
    names = ", ".join(f.name for f in found[-8:])
    return (f"Did you mean {above / close[0]}? " if close else "") + f"{place} holds {names}"


def _holds_a_state(folder: Path) -> bool:
    states = is_export(folder) or (folder / STATE_FILE).is_file() or is_export(folder / POLICY)
    return states or bool(_checkpoints_in(folder))


def _checkpoints_in(run_dir: Path) -> list[Path]:
    """Return the folders of a run's complete checkpoints, oldest first."""
    return sorted(file.parent for file in run_dir.glob(f"checkpoints/step-*/{STATE_FILE}"))


def is_export(folder: Path) -> bool:
    """Return whether the folder is an export."""
    return (folder / EXPORT_FILE).is_file()


def run_of(state: Path) -> Path:
    """Return the run directory of a checkpoint or of a run's ``policy/``; for an export elsewhere, the export itself.

    An export has its own config.yaml, so it can stand for its run.
    """
    if not is_export(state):
        return state.absolute().parent.parent
    return state.absolute().parent if (state.parent / CONFIG_FILE).is_file() else state


def config_of(source: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of the run of the newest state in ``source`` (see ``newest``), with overrides.

    Raises:
      CheckpointError: there is no state, or no config.
      ConfigError: an override is wrong.
    """
    state = newest(source)[1]
    return run_config(state if is_export(state) else run_of(state), overrides)


def run_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a run directory or an export. Raises CheckpointError when the folder has none."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} is no run directory and no export: there is no {CONFIG_FILE} in it")
    return load_config(str(file), overrides)


def _state_in(folder: Path) -> tuple[int, Path] | None:
    """Return (step, folder) of an export or a whole checkpoint, or None for any other folder."""
    if is_export(folder):
        return step_in(read_json(folder / EXPORT_FILE), folder / EXPORT_FILE), folder
    if (folder / STATE_FILE).is_file():
        return step_in(read_json(folder / STATE_FILE).get("state", {}), folder / STATE_FILE), folder
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises CheckpointError when there is none."""
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); export another state of the run") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: not what an export or checkpoint has there; export another state of the run")
    return tree


def step_in(tree: Any, file: Path) -> int:
    """Return the ``step`` of a tree read from ``file``. Raises CheckpointError without one."""
    value = tree.get("step") if isinstance(tree, dict) else None
    if not isinstance(value, int):
        raise CheckpointError(f"{file}: 'step' is missing; export another state of the run")
    return value
