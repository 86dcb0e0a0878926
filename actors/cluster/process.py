"""What Linux does for a process of ours: its end with its parent, and a bound on its memory."""

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
    """Have the kernel kill this multiprocessing child when its parent is gone, however that ended.

    vLLM's children would otherwise outlive an actor that is killed. Nothing to do in a process that
    is nobody's child (a driver, a Ray worker) or away from Linux.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # it was gone before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def memory_bound(gib: float | None) -> Iterator[None]:
    """A MemoryError here when this process takes ``gib`` GiB more than it has now; None is no bound.

    The bound is on the data segment (heap and private mappings), so what Ray has mapped does not count.
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
