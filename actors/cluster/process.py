"""Linux features that our processes use: ending a child with its parent, and a limit on memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this multiprocessing child when its parent ends, in whatever way.

    vLLM's child processes would otherwise outlive an actor that is killed. Does nothing in a process that
    multiprocessing did not start (a driver, a Ray worker), and nothing except on Linux.

    Raises:
      OSError: the kernel refused.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # the parent ended before prctl was called
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def memory_bound(gib: float | None) -> Iterator[None]:
    """Let this process allocate ``gib`` GiB more than it has now; beyond that, the block gets a MemoryError.

    The limit is on the data segment (heap and private mappings), so Ray's shared memory does not count. Without a
    number, and except on Linux, there is no limit.
    """
    if gib is None or not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
