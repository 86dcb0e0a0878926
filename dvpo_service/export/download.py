"""Copy the newest state of a run at a URL (``s3://bucket/runs/x``) to this machine, to export and evaluate it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvpo_service.errors import CheckpointError, describe_error
from dvpo_service.export.states import EXPORT_FILE, POLICY, nothing_in
from dvpo_service.runs.directory import BASE_FOLDER, SMALL_FILES
from dvpo_service.runs.integrity import STATE_FILE
from dvpo_service.runs.storage import StoragePath, files_below, is_url, storage_path

_ATTEMPTS = 3


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
            local = _copy_whole(place, Path(folder))
        except CheckpointError:
            raise
        except Exception as error:
            # Every kind of storage raises errors of its own: botocore's, aiohttp's, OSError.
            why = describe_error(error, 200)
            raise CheckpointError(f"{source} cannot be read: {why}; check the URL and the credentials") from error
        yield local


class _Changed(Exception):
    """The state was replaced or removed while it was copied."""


def _copy_whole(place: StoragePath, folder: Path) -> Path:
    """Copy the newest state at ``place`` into ``folder``, again when its run replaces it meanwhile."""
    for attempt in range(_ATTEMPTS):
        try:
            return _copy_newest(place, folder / str(attempt))
        except _Changed:
            shutil.rmtree(folder / str(attempt), ignore_errors=True)
    raise CheckpointError(
        f"{place} was rewritten {_ATTEMPTS} times while it was read: its run goes on; try again later"
    )


def _copy_newest(place: StoragePath, folder: Path) -> Path:
    """Copy the newest state at ``place`` into ``folder``; return the local run directory, checkpoint or export."""
    files = files_below(place)
    if EXPORT_FILE in files:
        return _copy_state(place, EXPORT_FILE, files, folder / place.name)
    if STATE_FILE in files:  # place is a checkpoint: RUN/checkpoints/step-000075
        run = place.parent.parent
        local = _copy(run, _run_files(files_below(run)), folder / run.name)
        return _copy_state(place, STATE_FILE, files, local / "checkpoints" / place.name)
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
    marker = newest + (EXPORT_FILE if newest == f"{POLICY}/" else STATE_FILE)
    wanted = [f for f in files if f.startswith(newest)] + _run_files(files)
    return _copy_state(place, marker, wanted, folder / place.name)


def _run_files(files: list[str]) -> list[str]:
    """Return those of the files that belong to the run itself, not to one of its states."""
    return [f for f in files if f in SMALL_FILES or f.startswith(f"{BASE_FOLDER}/")]


def _copy_state(source: Any, marker: str, files: list[str], target: Path) -> Path:
    """Copy the files of a state, which the file ``marker`` makes whole.

    Its writer removes the marker before anything else of the state, and writes it last. So when the marker is the same
    before and after, what was read in between is one state.

    Raises:
      _Changed: it is not the same.
    """
    before = _content(source, marker)
    try:
        _copy(source, files, target)
    except FileNotFoundError as error:
        raise _Changed from error
    if before is None or _content(source, marker) != before:
        raise _Changed
    return target


def _content(source: Any, name: str) -> bytes | None:
    source.fs.invalidate_cache()
    try:
        return source.fs.cat_file((source / name).path)
    except FileNotFoundError:
        return None


def _copy(source: Any, files: list[str], target: Path) -> Path:
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        source.fs.get_file((source / name).path, str(target / name))
    return target
