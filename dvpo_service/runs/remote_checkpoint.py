"""Checkpoints at a URL. An object store cannot rename, so a file that is written last marks a complete checkpoint."""

from __future__ import annotations

from typing import Any

from dvpo_service.errors import CheckpointError
from dvpo_service.runs.checkpoint import Checkpoints, Saving
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.integrity import STATE_FILE, Files, write_record
from dvpo_service.runs.storage import StoragePath, make_folder, remove_marked

_DAMAGED_STATE = f"{STATE_FILE}.damaged"  # the renamed marker of a damaged checkpoint


class SharedCheckpoints(Checkpoints):
    """Checkpoints at a URL.

    Parts are written to their final place, and state.json, written last, marks the checkpoint as complete. The run's
    small files (metrics and the like) are copied with each checkpoint.

    The methods also raise CheckpointError when another run has taken over the URL.
    """

    def __init__(self, run: RunDir, *, keep: int):
        super().__init__(run.local, keep=keep)
        self.run = run
        self.folder = run.location / "checkpoints"

    def set_aside(self) -> None:
        """Raise CheckpointError if an earlier run left checkpoints here, as they cannot be renamed."""
        if self.whole() or self._damaged_before():
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run; with trainer.resume=never choose another --run-dir"
            )

    def whole(self) -> list[StoragePath]:
        """Return the folders of all complete checkpoints, oldest first."""
        return super().whole() if self._exists() else []

    def _exists(self) -> bool:
        folder: Any = self.folder
        folder.fs.invalidate_cache()
        return folder.exists()

    def _folder_for(self, step: int) -> StoragePath:
        return self.folder / f"step-{step:06d}"

    def _prepare(self, saving: Saving) -> None:
        self.run.check_owner()
        self._remove(saving.folder)

    def _complete(self, saving: Saving, files: Files) -> None:
        self.run.mirror()
        self.run.check_owner()
        make_folder(saving.folder)
        write_record(saving.folder, saving.record, files)

    def _clear(self, saving: Saving) -> None:
        """Do nothing: without its marker the folder is no checkpoint, and a store that fails may fail here too."""

    def _remove(self, folder: Any) -> None:
        remove_marked(folder, STATE_FILE)

    def _set_damaged_aside(self, folder: Any) -> StoragePath:
        """Rename the marker and return its path; the files stay until a checkpoint of the same step replaces them."""
        target = folder / _DAMAGED_STATE
        target.write_bytes((folder / STATE_FILE).read_bytes())
        (folder / STATE_FILE).unlink()
        return target

    def _damaged_before(self) -> StoragePath | None:
        markers: Any = sorted(self.folder.glob(f"step-*/{_DAMAGED_STATE}"), key=str) if self._exists() else []
        return markers[0] if markers else None


def checkpoints_of(run: RunDir, *, keep: int) -> Checkpoints:
    """Return the checkpoints of a run, in a local folder or at a URL. The newest ``keep`` of them are kept."""
    return SharedCheckpoints(run, keep=keep) if run.is_remote else Checkpoints(run.local, keep=keep)
