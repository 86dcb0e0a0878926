"""Checkpoints at step boundaries: whole or not there, the oldest pruned."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo_service.errors import CheckpointError
from dvpo_service.rundir import RunDir
from dvpo_service.storage import Place, make_folder

log = logging.getLogger(__name__)

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    folder: Place
    record: dict[str, Any]


class Checkpoints:
    """``run_dir/checkpoints/step-000050``: a folder per part, and state.json, written last.

    Written beside and renamed when whole.
    """

    def __init__(self, run_dir: Path, *, keep: int):
        self.run_dir, self.keep = run_dir, keep
        self.folder: Place = run_dir / "checkpoints"
        self.newest: int | None = None  # step of the last one that this run wrote or read

    def save(self, step: int, parts: Mapping[str, Callable[[Any], None]], record: dict[str, Any]) -> Place:
        """Write a checkpoint; the previous one stays until this one is whole.

        Raises CheckpointError when the disk refuses it; earlier checkpoints are untouched.
        """
        folder = self.run_dir / "checkpoints"
        final, torn = folder / f"step-{step:06d}", folder / f".step-{step:06d}.tmp"
        try:
            shutil.rmtree(torn, ignore_errors=True)
            torn.mkdir(parents=True)
            for name, write in parts.items():
                (torn / name).mkdir()
                write(torn / name)
            (torn / STATE_FILE).write_text(json.dumps(record))
            _fsync_tree(torn)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(torn, final)
            _fsync(folder)
        except OSError as error:
            shutil.rmtree(torn, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {final}: {error.strerror or error}. Earlier checkpoints are whole; "
                "free some space and give the same command to continue from the newest"
            ) from error
        self.newest = step
        for old in self.whole()[: -self.keep]:
            self._remove(old)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; one that was cut off while being written does not count."""
        whole = self.whole()
        if not whole:
            return None
        file = whole[-1] / STATE_FILE
        try:
            found = Checkpoint(whole[-1], json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}); remove the folder to use the one before"
            ) from error
        self.newest = int(found.folder.name.removeprefix("step-"))
        return found

    def whole(self) -> list[Place]:
        """Every checkpoint that is all there, oldest first."""
        return sorted((p.parent for p in self.folder.glob(f"step-*/{STATE_FILE}")), key=str)

    def set_aside(self) -> None:
        """Start over: what an earlier run left here gets another name, so that it is neither read nor pruned."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for old in (self.run_dir / "checkpoints", self.run_dir / "policy"):
            if old.exists():
                os.replace(old, old.with_name(f"{old.name}-before-{stamp}"))

    def _remove(self, folder: Any) -> None:
        shutil.rmtree(folder)


class SharedCheckpoints(Checkpoints):
    """The same at a URL. An object store cannot rename: parts go to their place, and state.json, written last,
    says that they are whole. ``run``'s small files go with them."""

    def __init__(self, run: RunDir, *, keep: int):
        super().__init__(run.local, keep=keep)
        self.run, self.folder = run, run.place / "checkpoints"

    def save(self, step: int, parts: Mapping[str, Callable[[Any], None]], record: dict[str, Any]) -> Place:
        """Raises CheckpointError when the storage refuses it, or another run has taken the URL over."""
        final = self.folder / f"step-{step:06d}"
        try:
            self.run.check_owner()
            self._remove(final)
            for name, write in parts.items():
                make_folder(final / name)
                write(final / name)
            self.run.mirror()
            self.run.check_owner()
            make_folder(final)
            (final / STATE_FILE).write_text(json.dumps(record))
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoint {final}: {error.strerror or error}. Earlier checkpoints are whole; "
                "the same command continues from the newest"
            ) from error
        self.newest = step
        for old in self.whole()[: -self.keep]:
            self._remove(old)
        return final

    def set_aside(self) -> None:
        """An object store cannot rename. Raises CheckpointError when there is something to set aside."""
        if self.whole():
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run; with trainer.resume=never choose another --run-dir"
            )

    def whole(self) -> list[Place]:
        files: Any = self.folder
        files.fs.invalidate_cache()
        return super().whole() if files.exists() else []

    def _remove(self, folder: Any) -> None:
        """The marker first: what is left of a removal that was cut off is no checkpoint."""
        folder.fs.invalidate_cache()
        (folder / STATE_FILE).unlink(missing_ok=True)
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)


def checkpoints_of(run: RunDir, *, keep: int) -> Checkpoints:
    return SharedCheckpoints(run, keep=keep) if run.is_remote else Checkpoints(run.local, keep=keep)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
