"""Every process that a run had, and whether one is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

ACTORS = ("ray::VllmEngine", "ray::Rank", "ray::RewardWorker", "VLLM::", "EngineCore")


class Family:
    """Processes and their children's children, remembered from when they were seen. ``heads()`` are the pids whose
    descendants belong to it."""

    def __init__(self, heads: Callable[[], Iterable[int]]):
        self.heads, self.seen = heads, set[psutil.Process]()

    def look(self) -> None:
        for pid in self.heads():
            try:
                head = psutil.Process(pid)
                self.seen |= {head, *head.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue

    def left(self) -> list[str]:
        return [f"{p.pid} {title(p)}" for p in self.seen if _alive(p)]

    def actors_left(self) -> list[str]:
        """Those of a run alone: on a cluster that goes on, Ray's own processes stay."""
        return [name for name in self.left() if any(word in name for word in ACTORS)]

    def all_gone(self, within_s: float) -> float:
        """Seconds until no process is left."""
        return gone(self.left, within_s)


def gone(left: Callable[[], list[str]], within_s: float) -> float:
    began = time.monotonic()
    while left() and time.monotonic() - began < within_s:
        time.sleep(0.2)
    assert left() == [], f"still there after {within_s} s: {left()}"
    return time.monotonic() - began


def shared_memory() -> set[str]:
    """What programs have put into /dev/shm under a name."""
    return {f.name for f in Path("/dev/shm").iterdir()}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title(process: psutil.Process) -> str:
    """Its command line, short; Ray's and vLLM's processes say there what they are."""
    try:
        return (" ".join(process.cmdline()) or process.name())[:100]
    except psutil.NoSuchProcess:
        return "gone"
