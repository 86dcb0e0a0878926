"""Load on a running server, and its processes."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

from tests.serving.server import ServerProcess

Rows = list[dict[str, Any]]


def hammer(
    server: ServerProcess, clients: int, meanwhile: Callable[[], None], *, seconds: float, until: Callable[[Rows], bool]
) -> Rows:
    """Send requests from ``clients`` threads at once, run ``meanwhile`` in between, and return a row per answer.

    The threads stop ``seconds`` after ``until(rows)`` is true, and after three minutes at the latest.
    """
    rows: Rows = []
    enough = threading.Event()
    deadline = time.monotonic() + 180

    def one(number: int) -> None:
        with httpx.Client(headers={"authorization": "Bearer secret"}, timeout=120) as http:
            while not enough.is_set() and time.monotonic() < deadline:
                body = {"prompt": f"{number}+1=", "max_tokens": 48, "ignore_eos": True}
                answer = http.post(f"{server.url}/v1/completions", json=body)
                rows.append({"status": answer.status_code, "version": answer.headers.get("x-dvpo-version")})

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(one, i) for i in range(clients)]
        time.sleep(1.5)
        meanwhile()
        while not until(rows) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(seconds)
        enough.set()
        for job in running:
            job.result()
    return rows


def processes(server: ServerProcess, name: str) -> list[psutil.Process]:
    family = psutil.Process(server.process.pid).children(recursive=True)
    return [p for p in family if p.is_running() and any(name in part for part in p.cmdline())]


def all_back(server: ServerProcess, name: str, count: int = 2) -> list[psutil.Process]:
    """Wait until there are ``count`` processes of that name again, and return them."""
    until = time.monotonic() + 240
    while len(running := processes(server, name)) < count:
        assert time.monotonic() < until, f"only {len(running)} of {name}"
        time.sleep(0.5)
    return running


def settled(server: ServerProcess) -> None:
    """Wait until no policy replica starts: one that does is busy, and one that serves nobody is idle.

    A replica that starts while the run's export is replaced refuses what it read, and is started again.
    """
    until = time.monotonic() + 240
    names = ("VLLM::EngineCore", "ServeReplica:dvpo:policy")
    while any(_busy(p) for name in names for p in processes(server, name)):
        assert time.monotonic() < until, "a policy replica is still busy"


def _busy(process: psutil.Process) -> bool:
    try:
        return process.cpu_percent(interval=1.5) > 30
    except psutil.NoSuchProcess:
        return True  # it ended, so another starts
