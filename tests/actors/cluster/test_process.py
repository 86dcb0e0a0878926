"""The Linux features that our processes use, tested with real processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest

from actors.cluster.process import end_with_parent, memory_bound

FAMILY = """
import multiprocessing, os, time
from tests.actors.cluster.test_process import child
process = multiprocessing.get_context("spawn").Process(target=child, args=(os.getpid(),))
process.start()
print(process.pid, flush=True)
time.sleep(600)
"""


def child(parent: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(600)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_child_ends_with_a_parent_that_was_killed(stopped: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = parent.stdout.readline() + parent.stdout.readline()  # the pid and "ready", in either order
    pid = int(lines.replace("ready", ""))
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait(10)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_a_process_that_is_nobodys_child_is_left_alone() -> None:
    assert multiprocessing.parent_process() is None
    end_with_parent()


def test_more_memory_than_allowed_is_a_memory_error_and_the_bound_ends_with_the_call() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_bound(0.25):
        assert len(bytearray(2**20)) == 2**20
        with pytest.raises(MemoryError):
            bytearray(2**30)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(2**30)) == 2**30
