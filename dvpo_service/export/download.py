"""The newest state of a run at a URL (``s3://bucket/runs/x``) as a folder of this machine, to export and evaluate."""

from __future__ import annotations

import json
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
    """``source``, a run directory, a checkpoint of it or an export, as a path.

    Of a URL, what its newest state needs is copied to a temporary folder that lasts as long as the block: one
    checkpoint or export, and the run's small files.

    Raises CheckpointError when the URL cannot be read, UserError where its file system is not installed.
    """
    if not is_url(source):
        yield Path(source)
        return
    place = storage_path(source)
    with tempfile.TemporaryDirectory(prefix="dvpo-run-") as folder:
        try:
            local = _copy_newest(place, Path(folder))
        except CheckpointError:
            raise
        except Exception as error:
            # Each store has errors of its own: botocore's, aiohttp's, OSError.
            why = describe_error(error, 200)
            raise CheckpointError(f"{source} cannot be read: {why}; check the URL and the credentials") from error
        yield local


def _copy_newest(place: StoragePath, folder: Path) -> Path:
    files = files_below(place)
    if EXPORT_FILE in files:
        return _copy(place, files, folder / place.name)
    if STATE_FILE in files:  # a checkpoint: RUN/checkpoints/step-000050
        run = place.parent.parent
        local = _copy(run, _of_run(files_below(run)), folder / run.name)
        return _copy(place, files, local / "checkpoints" / place.name)
    whole = sorted(name for name in files if name.startswith("checkpoints/step-") and name.endswith(f"/{STATE_FILE}"))
    exported = f"{POLICY}/{EXPORT_FILE}"
    steps = {f"{name.rpartition('/')[0]}/": int(name.split("/")[1].removeprefix("step-")) for name in whole[-1:]}
    if exported in files:
        steps[f"{POLICY}/"] = int(json.loads((place / exported).read_text())["step"])
    if not steps:
        raise nothing_in(place)
    newest = max(reversed(steps), key=lambda name: steps[name])  # of equals policy/, which is exported already
    return _copy(place, [f for f in files if f.startswith(newest)] + _of_run(files), folder / place.name)


def _of_run(files: list[str]) -> list[str]:
    return [f for f in files if f in SMALL_FILES or f.startswith(f"{BASE_FOLDER}/")]


def _copy(source: Any, files: list[str], target: Path) -> Path:
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        source.fs.get_file((source / name).path, str(target / name))
    return target
