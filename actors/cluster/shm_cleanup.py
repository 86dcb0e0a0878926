"""Removing the names of vLLM's message queues in /dev/shm, so that a killed engine leaves no memory behind.

vLLM creates two queues per engine, of 160 and 240 MB, and removes their names when it ends in order. A killed engine
cannot do that. So the names are removed once every process of the engine has mapped the queues; the kernel then frees
the memory with the last process that maps it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil

QUEUE = "/dev/shm/psm_"  # the prefix that Python's multiprocessing.shared_memory gives to unnamed blocks


def remove_mapped_names() -> list[str]:
    """Remove the names of all queues that this process and its children map, and return the removed paths.

    Call it after an engine's start, when every process that opens a queue has done so. Does nothing except on Linux.
    """
    if not sys.platform.startswith("linux"):
        return []
    here = psutil.Process()
    names = {n for p in [here, *here.children(recursive=True)] for n in mapped_queues(_maps(p.pid))}
    return [n for n in sorted(names) if _removed(n)]


def mapped_queues(maps: Iterable[str]) -> set[str]:
    """Return the paths of the queues in the lines of a /proc/PID/maps.

    A queue whose name was removed before, which its line marks as ``(deleted)``, is left out.
    """
    paths = (line.split(maxsplit=5)[-1].strip() for line in maps)
    return {p for p in paths if p.startswith(QUEUE) and " " not in p}


def expect_removed_names() -> None:
    """Have vLLM close its queues without an error when their names are gone already.

    Call it in each process of an engine. Idempotent.
    """
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
    except (FileNotFoundError, ProcessLookupError):  # the process has just ended
        return []


def _removed(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
