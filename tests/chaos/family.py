"""Every process that a run had, and which of them are left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

ACTORS = ("ray::VllmEngine", "ray::Rank", "ray::RewardWorker", "VLLM::", "EngineCore")


class Family:
    """The processes of a run with all their descendants, remembered once they have been seen.

    Args:
      heads: returns the pids whose descendants belong to the run.
    """

    def __init__(self, heads: Callable[[], Iterable[int]]):
        self.heads = heads
        self.seen = set[psutil.Process]()

    def look(self) -> None:
        """Remember the processes that run now."""
        for pid in self.heads():
            try:
                head = psutil.Process(pid)
                self.seen |= {head, *head.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue

    def left(self) -> list[str]:
        """Return pid and title of every process that is still alive."""
        return [f"{p.pid} {title(p)}" for p in self.seen if _alive(p)]

    def actors_left(self) -> list[str]:
        """Return the run's actors that are still alive. Ray's own processes stay on a cluster that goes on."""
        return [name for name in self.left() if any(word in name for word in ACTORS)]

    def all_gone(self, within_s: float) -> float:
        """Return the seconds until no process is left. Raises AssertionError after ``within_s``."""
        return gone(self.left, within_s)


def gone(left: Callable[[], list[str]], within_s: float) -> float:
    """Return the seconds until ``left()`` is empty. Raises AssertionError after ``within_s``."""
    began = time.monotonic()
    while left() and time.monotonic() - began < within_s:
        time.sleep(0.2)
    assert left() == [], f"still there after {within_s} s: {left()}"
    return time.monotonic() - began


def shared_memory() -> set[str]:
    """Return the names of the files in /dev/shm."""
    return {f.name for f in Path("/dev/shm").iterdir()}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> str:
    """Return the start of a process's command line, where Ray's and vLLM's processes say what they are."""
    try:
        return (" ".join(process.cmdline()) or process.name())[:100]
    except psutil.NoSuchProcess:
        return "gone"
