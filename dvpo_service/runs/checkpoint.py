"""Checkpoints at step boundaries. One is either complete or absent; the oldest are pruned, damaged ones renamed."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvpo_service.errors import CheckpointError
from dvpo_service.roles import SaveJob
from dvpo_service.runs.integrity import STATE_FILE, Damaged, Files, verify, write_record
from dvpo_service.runs.storage import StoragePath, make_folder
from dvpo_service.types import Metrics

log = logging.getLogger(__name__)

_DAMAGED = "damaged-"  # prefix of a renamed folder
# How long a run that ends with an error waits for the checkpoint under way.
_LAST_WAIT_S = 60.0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; ``record`` is what was given to ``begin``, and the run's ``identity``."""

    folder: StoragePath
    record: dict[str, Any]


@dataclass
class Saving:
    """A checkpoint that is being written below ``folder``; ``jobs`` has one job per part."""

    step: int
    folder: StoragePath
    record: Mapping[str, Any]
    jobs: dict[str, SaveJob] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)


class Checkpoints:
    """A run's checkpoints: ``run_dir/checkpoints/step-000050`` with a folder per part, and state.json, written last.

    A checkpoint is written to a temporary folder, which is renamed when everything is written. Training continues
    meanwhile: ``begin`` starts a checkpoint, and ``advance`` (called at intervals) or ``finish`` completes it.

    These three raise CheckpointError when the disk refuses the checkpoint; earlier checkpoints are untouched.
    """

    def __init__(self, run_dir: Path, *, keep: int):
        self.run_dir = run_dir
        self.keep = keep
        self.folder: StoragePath = run_dir / "checkpoints"
        self.newest: int | None = None  # step of the last complete checkpoint that this run wrote or read
        self.saving: Saving | None = None
        self.identity: Mapping[str, str] = {}  # what the run may not change; part of every record
        self._took: Metrics = {}

    # Writing.

    def begin(self, step: int, parts: Mapping[str, Callable[[Any], SaveJob]], record: Mapping[str, Any]) -> None:
        """Start to write a checkpoint of the current state. A checkpoint that is under way is finished first.

        Args:
          step: the number of updates done.
          parts: by the name of its folder, a function that starts to write that part.
          record: what state.json holds besides checksums, as JSON; ``record["state"]["step"]`` is ``step``.
        """
        self.finish()
        if self.identity:
            record = {**record, "identity": dict(self.identity)}
        saving = Saving(step, self._folder_for(step), record)
        with self._reporting(saving):
            self._prepare(saving)
            for name, save in parts.items():
                make_folder(saving.folder / name)
                saving.jobs[name] = save(saving.folder / name)
        self.saving = saving

    def advance(self) -> None:
        """Complete the checkpoint under way if all its parts are written; do not wait for them."""
        if (saving := self.saving) is None:
            return
        with self._reporting(saving):
            written = all(job.done() for job in saving.jobs.values())
        if written:
            self.finish()

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until every part of the checkpoint under way is written, and complete it."""
        if (saving := self.saving) is None:
            return
        with self._reporting(saving):
            files: Files = {}
            for part, job in saving.jobs.items():
                for name, checksum in job.result(timeout_s).items():
                    files[f"{part}/{name}"] = checksum
            self._complete(saving, files)
        self.saving = None
        self.newest = saving.step
        self._took = {"time/checkpoint_write": time.perf_counter() - saving.began}
        for old in self.whole()[: -self.keep]:
            self._remove(old)

    def drop(self) -> None:
        """Give up the checkpoint under way: its writers are gone, or what they still write is not used."""
        if self.saving is not None:
            self._clear(self.saving)
            self.saving = None

    @contextmanager
    def finish_on_error(self) -> Iterator[None]:
        """Finish the checkpoint under way when an Exception leaves the block, waiting at most a minute for a part."""
        try:
            yield
        except Exception:
            step = self.saving.step if self.saving else None
            try:
                self.finish(_LAST_WAIT_S)
            except (CheckpointError, RuntimeError) as error:
                log.warning("the checkpoint of step %s, under way when the run ended, is lost: %s", step, error)
            raise

    def pop_metrics(self) -> Metrics:
        """Return the seconds from ``begin`` to the completion of the last checkpoint, once; afterwards nothing."""
        took, self._took = self._took, {}
        return took

    # Reading.

    def latest(self, note: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None if there is no checkpoint. Damaged newer ones are renamed.

        A checkpoint that is under way or was cut off does not count.

        Args:
          note: called with a line for each damaged checkpoint that is passed over.

        Raises:
          CheckpointError: all checkpoints are damaged, or the storage does not answer.
        """
        self.drop()
        damages = []
        for folder in reversed(self.whole()):
            try:
                checkpoint = Checkpoint(folder, _checked_record(folder))
            except Damaged as damage:
                damages.append(f"checkpoint {folder} is damaged: {damage}; kept as {self._set_damaged_aside(folder)}")
                continue
            self.newest = step_of(folder)
            for line in damages:
                note(f"{line}; continuing from {folder.name}")
            return checkpoint
        self.newest = None
        damaged_before = None if damages else self._damaged_before()
        if damages or damaged_before:
            what = ". ".join(damages) or f"{damaged_before} is damaged"
            raise CheckpointError(
                f"{what}. No whole checkpoint is left in {self.folder}: bring "
                "one back from a copy, choose another --run-dir, or start over with trainer.resume=never"
            )
        return None

    def whole(self) -> list[StoragePath]:
        """Return the folders of all complete checkpoints, oldest first."""
        return sorted((p.parent for p in self.folder.glob(f"step-*/{STATE_FILE}")), key=str)

    def set_aside(self) -> None:
        """Rename what an earlier run left here, so that a new run neither reads nor prunes it."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for old in (self.run_dir / "checkpoints", self.run_dir / "policy"):
            if old.exists():
                os.replace(old, old.with_name(f"{old.name}-before-{stamp}"))

    # What remote_checkpoint.py overrides, as an object store cannot rename.

    def _folder_for(self, step: int) -> StoragePath:
        return self.folder / f".step-{step:06d}.tmp"

    def _prepare(self, saving: Saving) -> None:
        """Remove the remains of checkpoints that were cut off, and make the folder."""
        for torn in [*self.run_dir.glob("checkpoints/.step-*.tmp"), *self.run_dir.glob("checkpoints/step-*")]:
            if torn.name.startswith(".") or not (torn / STATE_FILE).exists():
                shutil.rmtree(torn)
        make_folder(saving.folder)

    def _complete(self, saving: Saving, files: Files) -> None:
        torn = Path(str(saving.folder))
        final = torn.with_name(f"step-{saving.step:06d}")
        write_record(torn, saving.record, files)
        _fsync_tree(torn)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(torn, final)
        _fsync(final.parent)

    def _clear(self, saving: Saving) -> None:
        shutil.rmtree(str(saving.folder), ignore_errors=True)

    def _remove(self, folder: Any) -> None:
        """Remove the marker first, so that a removal that is cut off leaves no checkpoint."""
        (folder / STATE_FILE).unlink()
        shutil.rmtree(folder)

    def _set_damaged_aside(self, folder: Any) -> StoragePath:
        """Rename a damaged checkpoint to the first free name, and return its new path."""
        suffixes = ("", *(f"-{n}" for n in range(2, 1000)))
        targets = (folder.with_name(f"{_DAMAGED}{folder.name}{suffix}") for suffix in suffixes)
        target = next(path for path in targets if not path.exists())
        os.replace(folder, target)
        return target

    def _damaged_before(self) -> StoragePath | None:
        """Return a checkpoint that was found damaged at an earlier start, if there is one."""
        return next(iter(sorted(self.run_dir.glob(f"checkpoints/{_DAMAGED}step-*"))), None)

    @contextmanager
    def _reporting(self, saving: Saving) -> Iterator[None]:
        """Turn an OSError of the block into a CheckpointError, and give up the checkpoint."""
        try:
            yield
        except OSError as error:
            self._clear(saving)
            self.saving = None
            raise CheckpointError(
                f"cannot write checkpoint {self.folder}/step-{saving.step:06d}: {error.strerror or error}. Earlier "
                "checkpoints are whole; free some space and give the same command to continue from the newest"
            ) from error


def step_of(folder: StoragePath) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def _checked_record(folder: StoragePath) -> dict[str, Any]:
    record = verify(folder)
    if record["state"]["step"] != step_of(folder):
        raise Damaged(f"its {STATE_FILE} is of step {record['state']['step']}")
    return record


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
