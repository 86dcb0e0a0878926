"""Checkpoints at a URL: an object store cannot rename, so a marker, written last, says what is whole."""

from __future__ import annotations

from typing import Any

from dvpo_service.errors import CheckpointError
from dvpo_service.runs.checkpoint import Checkpoints, Saving
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.integrity import STATE_FILE, Files, write_record
from dvpo_service.runs.storage import StoragePath, make_folder

_DAMAGED_STATE = f"{STATE_FILE}.damaged"  # where folders cannot be renamed


class SharedCheckpoints(Checkpoints):
    """The same at a URL. An object store cannot rename: parts go to their place, and state.json, written last,
    says that they are whole. ``run``'s small files go with them.

    Also raises CheckpointError when another run has taken the URL over.
    """

    def __init__(self, run: RunDir, *, keep: int):
        super().__init__(run.local, keep=keep)
        self.run, self.folder = run, run.location / "checkpoints"

    def set_aside(self) -> None:
        """An object store cannot rename. Raises CheckpointError when there is something to set aside."""
        if self.whole() or self._put_by_before():
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run; with trainer.resume=never choose another --run-dir"
            )

    def whole(self) -> list[StoragePath]:
        return super().whole() if self._exists() else []

    def _exists(self) -> bool:
        files: Any = self.folder
        files.fs.invalidate_cache()
        return files.exists()

    def _place(self, step: int) -> StoragePath:
        return self.folder / f"step-{step:06d}"

    def _prepare(self, saving: Saving) -> None:
        self.run.check_owner()
        self._remove(saving.folder)

    def _make_whole(self, saving: Saving, files: Files) -> None:
        self.run.mirror()
        self.run.check_owner()
        make_folder(saving.folder)
        write_record(saving.folder, saving.record, files)

    def _clear(self, saving: Saving) -> None:
        """Without its marker it is no checkpoint, and a store that refuses may refuse this too."""

    def _remove(self, folder: Any) -> None:
        folder.fs.invalidate_cache()
        (folder / STATE_FILE).unlink(missing_ok=True)
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)

    def _put_by(self, folder: Any) -> StoragePath:
        """Its files stay until a checkpoint of the same step takes their place."""
        target = folder / _DAMAGED_STATE
        target.write_bytes((folder / STATE_FILE).read_bytes())
        (folder / STATE_FILE).unlink()
        return target

    def _put_by_before(self) -> StoragePath | None:
        found: Any = sorted(self.folder.glob(f"step-*/{_DAMAGED_STATE}"), key=str) if self._exists() else []
        return found[0] if found else None


def checkpoints_of(run: RunDir, *, keep: int) -> Checkpoints:
    """Return the checkpoints of a run, wherever it is; at most ``keep`` stay."""
    return SharedCheckpoints(run, keep=keep) if run.is_remote else Checkpoints(run.local, keep=keep)
