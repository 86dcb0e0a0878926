"""vLLM's message queues in /dev/shm: their names go once an engine has mapped them, so that nothing outlives it.

vLLM makes two of them an engine, 160 and 240 MB, and removes their names when it ends in order. A killed engine
cannot; the memory itself, without a name, the kernel takes back with the last process that maps it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil

QUEUE = "/dev/shm/psm_"  # as Python's multiprocessing.shared_memory names what has no name of its own


def remove_mapped_names() -> list[str]:
    """Remove the names of all queues that this process and its children map; those removed.

    For when every process that will open one has done so: after an engine's start. Nothing away from Linux.
    """
    if not sys.platform.startswith("linux"):
        return []
    here = psutil.Process()
    names = {n for p in [here, *here.children(recursive=True)] for n in mapped_queues(_maps(p.pid))}
    return [n for n in sorted(names) if _removed(n)]


def mapped_queues(maps: Iterable[str]) -> set[str]:
    """Paths of the queues in the lines of a /proc/PID/maps; those whose name is gone end with ``(deleted)``."""
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps)
    return {p for p in paths if p.startswith(QUEUE) and " " not in p}


def expect_removed_names() -> None:
    """In each process of an engine: have vLLM's queues end in order when their names are gone already. Idempotent."""
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    queue: Any = ShmRingBuffer
    end = queue.__del__
    if end.__module__ == __name__:
        return

    def end_without_name(self: Any) -> None:
        try:
            end(self)
        except FileNotFoundError:
            resource_tracker.unregister(self.shared_memory._name, "shared_memory")

    queue.__del__ = end_without_name


def _maps(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return []


def _removed(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
