"""vLLM's own queues in real processes: they work without their names, and close without an error."""

from __future__ import annotations

import subprocess
import sys

from actors.cluster.shm_cleanup import mapped_queues

QUEUE = """
from pathlib import Path
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
from actors.cluster.shm_cleanup import expect_removed_names, remove_mapped_names
expect_removed_names()
expect_removed_names()
ring = ShmRingBuffer(1, 1000, 2)
other = ShmRingBuffer(*ring.handle())  # as in a worker
name = "/dev/shm/" + ring.shared_memory.name
assert remove_mapped_names() == [name] and not Path(name).exists()
assert remove_mapped_names() == []
with ring.get_data(1) as data:
    data[:3] = b"abc"
with other.get_data(1) as data:
    print(bytes(data[:3]))
del ring, other
"""


def test_a_queue_works_and_ends_in_order_without_its_name() -> None:
    done = subprocess.run([sys.executable, "-c", QUEUE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "b'abc'"
    assert "Exception ignored" not in done.stderr
    assert "leaked" not in done.stderr


def test_queues_are_found_in_a_process_s_maps() -> None:
    maps = [
        "7f00-7f10 rw-s 00000000 00:1a 12  /dev/shm/psm_0a1b2c3d",
        "7f10-7f20 rw-s 00000000 00:1a 13  /dev/shm/psm_deadbeef (deleted)",
        "7f20-7f30 rw-s 00000000 00:1a 14  /dev/shm/sem.other",
        "7f30-7f40 rw-p 00000000 00:00 0 ",
    ]
    assert mapped_queues(maps) == {"/dev/shm/psm_0a1b2c3d"}
