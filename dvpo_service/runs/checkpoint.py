"""Checkpoints at step boundaries: whole or not there, the oldest pruned, damaged ones set aside."""

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

_DAMAGED = "damaged-"  # before the name of a folder
# How long a run that ends with an error waits for the save under way.
_LAST_WAIT_S = 60.0


@dataclass(frozen=True)
class Checkpoint:
    folder: StoragePath
    record: dict[str, Any]


@dataclass
class Saving:
    """A checkpoint that is being written below ``folder``, part by part."""

    step: int
    folder: StoragePath
    record: Mapping[str, Any]
    jobs: dict[str, SaveJob] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)


class Checkpoints:
    """``run_dir/checkpoints/step-000050``: a folder per part, and state.json, written last.

    Written beside and renamed when whole. That takes as long as it takes while training goes on:
    ``begin`` starts it, ``advance``, called now and then, or ``finish`` completes it.

    Each of them raises CheckpointError when the disk refuses the checkpoint; earlier ones are untouched.
    """

    def __init__(self, run_dir: Path, *, keep: int):
        self.run_dir, self.keep = run_dir, keep
        self.folder: StoragePath = run_dir / "checkpoints"
        self.newest: int | None = None  # step of the last whole one that this run wrote or read
        self.saving: Saving | None = None
        self._took: Metrics = {}

    # Writing.

    def begin(self, step: int, parts: Mapping[str, Callable[[Any], SaveJob]], record: Mapping[str, Any]) -> None:
        """Start to write a checkpoint of the state as it is now. One that is under way is finished first."""
        self.finish()
        saving = Saving(step, self._place(step), record)
        with self._reporting(saving):
            self._prepare(saving)
            for name, save in parts.items():
                make_folder(saving.folder / name)
                saving.jobs[name] = save(saving.folder / name)
        self.saving = saving

    def advance(self) -> None:
        """Make the checkpoint under way whole if all its parts are written. Does not wait for that."""
        if (saving := self.saving) is None:
            return
        with self._reporting(saving):
            written = all(job.done() for job in saving.jobs.values())
        if written:
            self.finish()

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint under way is written, and make it whole."""
        if (saving := self.saving) is None:
            return
        with self._reporting(saving):
            files = {f"{n}/{f}": s for n, job in saving.jobs.items() for f, s in job.result(timeout_s).items()}
            self._make_whole(saving, files)
        self.saving, self.newest = None, saving.step
        self._took = {"time/checkpoint_write": time.perf_counter() - saving.began}
        for old in self.whole()[: -self.keep]:
            self._remove(old)

    def drop(self) -> None:
        """Forget the checkpoint under way: those who write it are gone, or will write to nowhere."""
        if self.saving is not None:
            self._clear(self.saving)
            self.saving = None

    @contextmanager
    def finish_on_error(self) -> Iterator[None]:
        """An error that ends the block does not cost the checkpoint under way, if it can be had soon."""
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
        """How long the last checkpoint took from ``begin`` until it was whole; once."""
        took, self._took = self._took, {}
        return took

    # Reading.

    def latest(self, note: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """Return the newest checkpoint whose every file is as it was written; newer ones get another name.

        One that is under way or was cut off does not count. ``note`` is told of damaged ones. Raises CheckpointError
        when there are only those, or the storage does not answer.
        """
        self.drop()
        damages = []
        for folder in reversed(self.whole()):
            try:
                found = Checkpoint(folder, _checked(folder))
            except Damaged as damage:
                damages.append(f"checkpoint {folder} is damaged: {damage}; kept as {self._put_by(folder)}")
                continue
            self.newest = step_of(folder)
            for line in damages:
                note(f"{line}; continuing from {folder.name}")
            return found
        self.newest = None
        if damages or (put_by := self._put_by_before()):
            raise CheckpointError(
                f"{'. '.join(damages) or f'{put_by} is damaged'}. No whole checkpoint is left in {self.folder}: bring "
                "one back from a copy, choose another --run-dir, or start over with trainer.resume=never"
            )
        return None

    def whole(self) -> list[StoragePath]:
        """Every checkpoint that was written to its end, oldest first."""
        return sorted((p.parent for p in self.folder.glob(f"step-*/{STATE_FILE}")), key=str)

    def set_aside(self) -> None:
        """Start over: what an earlier run left here gets another name, so that it is neither read nor pruned."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for old in (self.run_dir / "checkpoints", self.run_dir / "policy"):
            if old.exists():
                os.replace(old, old.with_name(f"{old.name}-before-{stamp}"))

    # What differs where nothing can be renamed.

    def _place(self, step: int) -> StoragePath:
        return self.folder / f".step-{step:06d}.tmp"

    def _prepare(self, saving: Saving) -> None:
        """Remove what saves that were cut off have left, and make the folder."""
        for torn in [*self.run_dir.glob("checkpoints/.step-*.tmp"), *self.run_dir.glob("checkpoints/step-*")]:
            if torn.name.startswith(".") or not (torn / STATE_FILE).exists():
                shutil.rmtree(torn)
        make_folder(saving.folder)

    def _make_whole(self, saving: Saving, files: Files) -> None:
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
        """The marker first: what is left of a removal that was cut off is no checkpoint."""
        (folder / STATE_FILE).unlink()
        shutil.rmtree(folder)

    def _put_by(self, folder: Any) -> StoragePath:
        names = (f"{_DAMAGED}{folder.name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        target = next(p for name in names if not (p := folder.with_name(name)).exists())
        os.replace(folder, target)
        return target

    def _put_by_before(self) -> StoragePath | None:
        return next(iter(sorted(self.run_dir.glob(f"checkpoints/{_DAMAGED}step-*"))), None)

    @contextmanager
    def _reporting(self, saving: Saving) -> Iterator[None]:
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
    return int(folder.name.removeprefix("step-"))


def _checked(folder: StoragePath) -> dict[str, Any]:
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
