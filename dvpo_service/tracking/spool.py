"""Keep artifacts in files until MLflow has them, through outages and the end of the process."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

UNSENT = "mlflow-unsent"  # in the run directory: artifacts that MLflow does not have yet


class Spool:
    """A folder with a file for each artifact that is not sent yet; its path below the folder is its path in MLflow.

    Args:
      folder: where the files are.
      fresh: delete the files that another run has left in the folder.
      limit_mib: the size of all files, in MiB; when they are larger, the oldest are dropped.

    Attributes:
      dropped: the number of files that were dropped.
    """

    def __init__(self, folder: Path, *, fresh: bool, limit_mib: float = 512.0):
        self.folder = folder
        self.dropped = 0
        self._limit = limit_mib * 2**20
        self._lock = threading.Lock()  # one thread replaces a file, another removes it once it is sent
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)  # there until MLflow has everything, see close

    def add(self, path: str, write: Callable[[Path], None]) -> None:
        """Call ``write`` with the file to write for the artifact ``path``; replace the artifact if it waits already."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}")  # with the suffix, from which matplotlib takes the format
        write(beside)
        with self._lock:
            os.replace(beside, target)
            self._trim()

    def waiting(self) -> list[str]:
        """Return the paths of the artifacts that are not sent yet, oldest first."""
        return [str(file.relative_to(self.folder)) for file in self._files()]

    def send(self, path: str, upload: Callable[[Path], None]) -> None:
        """Call ``upload`` with the file of the artifact ``path``, and delete the file. Do nothing without a file."""
        file = self.folder / path
        try:
            uploaded = file.stat()
        except FileNotFoundError:
            return
        upload(file)
        with self._lock:
            if file.exists() and os.path.samestat(file.stat(), uploaded):  # else it was replaced meanwhile
                file.unlink()

    def close(self, *, all_sent: bool) -> None:
        """Remove the folder, unless something waits in it or elsewhere (not ``all_sent``).

        So a folder that is there says that the same command has something to send.
        """
        if all_sent and not self.waiting():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        files = [f for f in self.folder.rglob("*") if f.is_file() and not f.name.startswith(".")]
        return sorted(files, key=lambda f: (f.stat().st_mtime_ns, f))

    def _trim(self) -> None:
        files = self._files()
        total = sum(f.stat().st_size for f in files)
        for file in files[:-1]:
            if total <= self._limit:
                return
            total -= file.stat().st_size
            file.unlink()
            self.dropped += 1
