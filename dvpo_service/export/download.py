"""Copy the newest state of a run at a URL (``s3://bucket/runs/x``) to this machine, to export and evaluate it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvpo_service.errors import CheckpointError, describe_error
from dvpo_service.export.export import EXPORT_FILE, POLICY, nothing_in
from dvpo_service.runs.directory import BASE_FOLDER, SMALL_FILES
from dvpo_service.runs.integrity import STATE_FILE
from dvpo_service.runs.storage import StoragePath, files_below, is_url, storage_path


@contextmanager
def local_copy(source: str) -> Iterator[Path]:
    """Yield ``source`` as a path on this machine.

    From a URL, the newest checkpoint or export and the run's small files are copied to a temporary folder, which is
    removed at the end of the block. A path is yielded with ``~`` expanded.

    Args:
      source: the path or URL of a run directory, of one of its checkpoints, or of an export.

    Raises:
      CheckpointError: the URL cannot be read, or there is nothing to export.
      UserError: the package for the URL's file system is not installed.
    """
    if not is_url(source):
        yield Path(os.path.expanduser(source))
        return
    place = storage_path(source)
    with tempfile.TemporaryDirectory(prefix="dvpo-run-") as folder:
        try:
            local = _copy_newest(place, Path(folder))
        except CheckpointError:
            raise
        except Exception as error:
            # Every kind of storage raises errors of its own: botocore's, aiohttp's, OSError.
            why = describe_error(error, 200)
            raise CheckpointError(f"{source} cannot be read: {why}; check the URL and the credentials") from error
        yield local


def _copy_newest(place: StoragePath, folder: Path) -> Path:
    """Copy the newest state at ``place`` into ``folder``; return the local run directory, checkpoint or export."""
    files = files_below(place)
    if EXPORT_FILE in files:
        return _copy(place, files, folder / place.name)
    if STATE_FILE in files:  # place is a checkpoint: RUN/checkpoints/step-000050
        run = place.parent.parent
        local = _copy(run, _run_files(files_below(run)), folder / run.name)
        return _copy(place, files, local / "checkpoints" / place.name)
    whole = sorted(name for name in files if name.startswith("checkpoints/step-") and name.endswith(f"/{STATE_FILE}"))
    exported = f"{POLICY}/{EXPORT_FILE}"
    steps = {}  # of the newest checkpoint's folder, and of policy/
    if whole:
        checkpoint = whole[-1].removesuffix(STATE_FILE)
        steps[checkpoint] = int(checkpoint.split("/")[1].removeprefix("step-"))
    if exported in files:
        steps[f"{POLICY}/"] = int(json.loads((place / exported).read_text())["step"])
    if not steps:
        raise nothing_in(place)
    newest = max(reversed(steps), key=lambda name: steps[name])  # at equal steps policy/: it is exported already
    return _copy(place, [f for f in files if f.startswith(newest)] + _run_files(files), folder / place.name)


def _run_files(files: list[str]) -> list[str]:
    """Return those of the files that belong to the run itself, not to one of its states."""
    return [f for f in files if f in SMALL_FILES or f.startswith(f"{BASE_FOLDER}/")]


def _copy(source: Any, files: list[str], target: Path) -> Path:
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        source.fs.get_file((source / name).path, str(target / name))
    return target
