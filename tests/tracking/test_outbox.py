"""The outbox: the order of calls, outages, the bound on waiting calls, and the deadline."""

from __future__ import annotations

import threading
import time

from dvpo_service.tracking.outbox import Outbox
from tests.tracking.conftest import wait_until


class Server:
    """A fake server: it receives calls while it is up."""

    def __init__(self):
        self.up = True
        self.got = []

    def call(self, what):
        def send():
            if not self.up:
                raise ConnectionError("down")
            self.got.append(what)

        return send


def test_an_outage_keeps_the_order_and_warns_once_per_outage():
    server, warnings = Server(), []
    box = Outbox(warnings.append)
    server.up = False
    for i in range(3):
        box.put(f"m{i}", server.call(i), keep=True)
        wait_until(lambda attempts=i + 1: box.failures == attempts)
    assert server.got == []
    assert box.failures == 3
    assert len(warnings) == 1
    assert "m0 not sent (kept, sent later): ConnectionError: down" in warnings[0]
    server.up = True
    box.put("m3", server.call(3), keep=True)
    wait_until(lambda: len(server.got) == 4)
    assert server.got == [0, 1, 2, 3]
    server.up = False
    box.put("m4", server.call(4), keep=True)
    assert box.close(5) == 1
    assert len(warnings) == 2


def test_what_need_not_be_kept_is_left_out_and_does_not_block():
    server, warnings = Server(), []
    box = Outbox(warnings.append)
    server.up = False
    box.put("figure", server.call("figure"))
    wait_until(lambda: box.failures == 1)
    server.up = True
    box.put("m", server.call("m"), keep=True)
    assert box.close(5) == 0
    assert server.got == ["m"]
    assert (box.dropped, box.failures) == (1, 1)


def test_a_hopeless_call_is_not_tried_again():
    box = Outbox(lambda text: None, hopeless=lambda error: isinstance(error, KeyError))
    tries = []

    def broken():
        tries.append(1)
        raise KeyError("bad name")

    box.put("bad", broken, keep=True)
    box.put("good", lambda: tries.append(2), keep=True)
    assert box.close(5) == 0
    assert tries == [1, 2]


def test_memory_is_bounded_and_pictures_go_first():
    server = Server()
    box = Outbox(lambda text: None, limit=3)
    server.up = False
    calls = (("a", True), ("picture", False), ("b", True), ("c", True), ("d", True))
    for i, (name, keep) in enumerate(calls):
        box.put(name, server.call(name), keep=keep)
        wait_until(lambda attempts=i + 1: box.failures == attempts)
    server.up = True
    assert box.close(5) == 0
    assert server.got == ["b", "c", "d"]
    assert box.dropped == 2


def test_putting_and_closing_do_not_wait_for_a_server_that_hangs():
    release = threading.Event()
    box = Outbox(lambda text: None)
    began = time.monotonic()
    box.put("hangs", lambda: release.wait(30) and None, keep=True)
    box.put("next", lambda: None, keep=True)
    assert box.close(0.2) == 2
    assert time.monotonic() - began < 2
    release.set()
