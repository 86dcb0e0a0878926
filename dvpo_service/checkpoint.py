"""Checkpoints at step boundaries: written beside, renamed when whole, the oldest pruned."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo_service.errors import CheckpointError

log = logging.getLogger(__name__)

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    record: dict[str, Any]


class Checkpoints:
    """``run_dir/checkpoints/step-000050``: a folder per part, and state.json, written last."""

    def __init__(self, run_dir: Path, *, keep: int):
        self.run_dir, self.keep = run_dir, keep
        self.folder = run_dir / "checkpoints"

    def save(self, step: int, parts: Mapping[str, Callable[[Path], None]], record: dict[str, Any]) -> Path:
        """Write a checkpoint; the previous one stays until this one is whole.

        Raises CheckpointError when the disk refuses it; earlier checkpoints are untouched.
        """
        final, torn = self.folder / f"step-{step:06d}", self.folder / f".step-{step:06d}.tmp"
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
            _fsync(self.folder)
        except OSError as error:
            shutil.rmtree(torn, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {final}: {error.strerror or error}. Earlier checkpoints are whole; "
                "free some space and give the same command to continue from the newest"
            ) from error
        for old in self.whole()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; one that was cut off while being written does not count."""
        whole = self.whole()
        if not whole:
            return None
        file = whole[-1] / STATE_FILE
        try:
            return Checkpoint(whole[-1], json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}); remove the folder to use the one before"
            ) from error

    def whole(self) -> list[Path]:
        """Every checkpoint that is all there, oldest first."""
        return sorted(p.parent for p in self.folder.glob(f"step-*/{STATE_FILE}"))


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
