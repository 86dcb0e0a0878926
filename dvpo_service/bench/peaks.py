"""The largest memory of new processes while they do one thing."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GIB = 2**30


def peaks(work: Callable[..., Any], arguments: tuple[Any, ...], world: int) -> list[dict[str, float]]:
    """Return by how much the memory of each of ``world`` new processes grew in ``work``: see ``Peak.grown``.

    Args:
      work: a module's function; the processes are the ranks of a gloo group. What it returns is kept until all have
        measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers: SimpleQueue[dict[str, float]] = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_process, (work, arguments, world, f"{folder}/store", answers), nprocs=world)
        return [answers.get() for _ in range(world)]


def _process(
    rank: int, work: Callable[..., Any], arguments: tuple[Any, ...], world: int, store: str, answers: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    peak = Peak()
    kept = work(*arguments)
    answers.put(peak.grown())
    dist.barrier()
    del kept
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


class Peak:
    """The largest resident memory of this process since its beginning."""

    def __init__(self) -> None:
        self.before = self.largest = _resident()
        threading.Thread(target=self._watch, daemon=True).start()

    def grown(self) -> dict[str, float]:
        """Return the growth in GiB: ``all``, and ``private`` without pages of files, which the kernel may drop."""
        self._measure()
        pairs = zip(("all", "private"), self.largest, self.before, strict=True)
        return {name: round((now - before) / GIB, 3) for name, now, before in pairs}

    def _watch(self) -> None:
        while True:
            self._measure()
            time.sleep(0.005)

    def _measure(self) -> None:
        now = _resident()
        self.largest = (max(self.largest[0], now[0]), max(self.largest[1], now[1]))


def _resident() -> tuple[int, int]:
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    page = os.sysconf("SC_PAGESIZE")
    return resident * page, (resident - shared) * page
