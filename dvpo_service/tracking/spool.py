"""Artifacts on their way to MLflow wait in files, through outages and the end of the process."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path


class Spool:
    """A file below ``folder`` for each artifact not yet sent; its path there is its path in MLflow.

    At most ``limit_mib`` wait; beyond that the oldest go.
    """

    def __init__(self, folder: Path, *, fresh: bool, limit_mib: float = 512.0):
        self.folder = folder
        self.dropped = 0
        self._limit = limit_mib * 2**20
        self._lock = threading.Lock()  # a file is replaced on one thread and removed, once sent, on another
        if fresh:  # what another run in this directory did not send
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, path: str, write: Callable[[Path], None]) -> None:
        """Have ``write`` make the file of artifact ``path``, in place of one that waits there."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}")  # keeps the suffix: matplotlib goes by it
        write(beside)
        with self._lock:
            os.replace(beside, target)
            self._trim()

    def waiting(self) -> list[str]:
        """Artifact paths, oldest first."""
        return [str(file.relative_to(self.folder)) for file in self._files()]

    def send(self, path: str, upload: Callable[[Path], None]) -> None:
        """Upload the file of artifact ``path`` and remove it. Nothing to do when it went already."""
        file = self.folder / path
        try:
            sent = file.stat()
        except FileNotFoundError:
            return
        upload(file)
        with self._lock:
            if file.exists() and os.path.samestat(file.stat(), sent):  # else it was made anew meanwhile
                file.unlink()

    def _files(self) -> list[Path]:
        found = [f for f in self.folder.rglob("*") if f.is_file() and not f.name.startswith(".")]
        return sorted(found, key=lambda f: (f.stat().st_mtime_ns, f))

    def _trim(self) -> None:
        files = self._files()
        total = sum(f.stat().st_size for f in files)
        for file in files[:-1]:
            if total <= self._limit:
                return
            total -= file.stat().st_size
            file.unlink()
            self.dropped += 1
