"""Things that a run depends on and the harness breaks: a small disk, the newest checkpoint, a process tree."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

TRIES = 100


@dataclass
class SmallDisk:
    """A tmpfs of ``mib`` MiB at ``folder``, which needs root; with None a plain folder, which cannot be filled."""

    folder: Path
    mib: int | None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.mib is not None:
            _run("mount", "-t", "tmpfs", "-o", f"size={self.mib}m", "tmpfs", str(self.folder))
        return self

    def __exit__(self, *exc: object) -> None:
        if self.mib is not None:
            _run("umount", "--lazy", str(self.folder))

    def fill(self, leave: int) -> None:
        """Write a file until at most ``leave`` bytes are free; a second call adds what was freed since the first.

        A save may take space meanwhile, so that a try fails.
        """
        with (self.folder / "ballast").open("ab") as file:
            for _ in range(TRIES):
                if (free := shutil.disk_usage(self.folder).free) <= leave:
                    return
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free - leave)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def empty(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)


def corrupt_newest(checkpoints: Path) -> Path:
    """Change bytes in the middle of the newest checkpoint's largest file. Return the checkpoint's folder."""
    newest = sorted(checkpoints.glob("step-*/state.json"))[-1].parent
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        original = file.read(64)
        file.seek(-len(original), os.SEEK_CUR)
        file.write(bytes(b ^ 0xFF for b in original))
    return newest


def kill_tree(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill a process and all its descendants at once, as when a machine loses power."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(30)
    psutil.wait_procs(family, timeout=10)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
