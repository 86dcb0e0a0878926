"""A Ray cluster on this machine, made by `ray start`: a head and workers, each with its own resources."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 120.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


# Only jobs of this process get into its clusters, and they get into no other cluster.
TOKEN = secrets.token_hex(32)


def environment() -> dict[str, str]:
    """Return the environment of a shell with the virtual environment activated, without another cluster's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass
class RayNode:
    """A running `ray start --block`. ``inside`` is put before a command so that it runs on the same host."""

    process: subprocess.Popen[bytes]
    log: Path
    inside: Sequence[str] = ()

    def end(self) -> None:
        """End this node's processes, by their pids."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            end(process)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        self.process.wait(10)


def end(process: psutil.Process) -> None:
    if process.is_running():
        process.terminate()


@dataclass
class RayCluster:
    """``with RayCluster() as cluster``: a head, then workers as they are added. All end with the block, by their pids.

    Attributes:
      variables: additional environment variables for the nodes.
    """

    ip: str = "127.0.0.1"
    nodes: list[RayNode] = field(default_factory=list)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="dvj", dir="/tmp")))
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    variables: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for node in reversed(self.nodes):
            node.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def dashboard(self) -> str:
        return f"http://{self.ip}:{self.dashboard_port}"

    def start_head(self, cpus: float, inside: Sequence[str] = ()) -> RayNode:
        head = [
            "--head",
            *(f"--port={self.port}", "--dashboard-host=0.0.0.0"),
            *(f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={free_port()}"),
        ]
        return self._start(head, cpus, self.ip, inside)

    def start_worker(self, cpus: float, ip: str = "127.0.0.1", inside: Sequence[str] = ()) -> RayNode:
        return self._start([f"--address={self.ip}:{self.port}"], cpus, ip, inside)

    def _start(self, arguments: list[str], cpus: float, ip: str, inside: Sequence[str]) -> RayNode:
        log = self.folder / f"node-{len(self.nodes)}.log"
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(*inside, str(BIN / "ray"), "start", "--block", "--disable-usage-stats"),
                    *(*arguments, f"--node-ip-address={ip}", f"--num-cpus={cpus:g}", "--object-store-memory=200000000"),
                    *(f"--{name}={free_port()}" for name in (*ports, "runtime-env-agent-port")),
                    # A folder for each node: a raylet removes a job's working directory when it is done with it.
                    f"--temp-dir={self.folder}/{len(self.nodes)}",
                    # Several raylets of one machine would hand out the same ports from a range.
                    *("--min-worker-port=0", "--max-worker-port=0"),
                ],
                env=environment() | self.variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        node = RayNode(process, log, inside)
        self.nodes.append(node)
        wait_until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, START_S)
        assert process.poll() is None, log.read_text()
        return node

    def ray(self, *arguments: str, cwd: Path | None = None, check: bool = True) -> str:
        """Run a `ray` command against this cluster, and return its output."""
        inside = self.nodes[0].inside
        done = subprocess.run(
            [*inside, str(BIN / "ray"), *arguments],
            env=environment() | {"RAY_ADDRESS": self.dashboard},
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 or not check, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def status(self, job: str) -> str:
        """Return a job's status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        words = self.ray("job", "status", job).upper()
        return next(s for s in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING") if s in words)

    def homes(self, *classes: str) -> dict[str, set[str]]:
        """Return the ids of the nodes with living actors, by class of actor."""
        output = self.ray("list", "actors", "--filter", "state=ALIVE", "--format", "json", "--limit", "500")
        listed = [] if output.startswith("No resource") else json.loads(output)
        return {c: {a["node_id"] for a in listed if a["class_name"] == c} for c in classes}


def wait_until(true: Callable[[], Any], seconds: float, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.3)
