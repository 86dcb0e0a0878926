"""The harness outside of the driver: it restarts the driver whenever it ends, and breaks what the run depends on."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dvpo_service.terminal.progress import progress
from tests.chaos.events import Events
from tests.chaos.family import Family, gone, shared_memory, title
from tests.chaos.faults import KINDS, Fault
from tests.chaos.machines import SmallDisk, corrupt_newest, kill_tree
from tests.chaos.report import Check
from tests.e2e.raycluster import ROOT, RayCluster, environment
from tests.tracking.server import MlflowServer

HEAD_CPUS, WORKER_CPUS, WORKERS = 3, 4, 2
STALL_S = 420.0  # after this time without a step, the run counts as stuck
NODE_AWAY_S = 3.0
LEFT_FREE = 2 * 2**20  # bytes free on the full disk: room for lines of metrics, none for a checkpoint
GONE_S = 60.0
DISK_S = 400.0  # a save meets the full disk within this time


# For the MLflow client of this process, while the server is away.
os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class Stuck(RuntimeError):
    """No step within ``STALL_S``."""


class Harness:
    """Runs ``tests.chaos.faulty_run`` to its end, and causes the faults of ``plan`` that come from outside.

    Attributes:
      unexpected: ends of a driver that no fault explains, in words.
    """

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        plan: Sequence[Fault],
        events: Events,
        cluster: RayCluster,
        mlflow: MlflowServer,
        disk: SmallDisk,
        steps: int,
    ):
        self.config = config
        self.run_dir = run_dir
        self.events = events
        self.steps = steps
        self.cluster = cluster
        self.mlflow = mlflow
        self.disk = disk
        self.pending = [f for f in plan if not KINDS[f.kind].at]
        self.planned = len(plan)
        self.driver: subprocess.Popen[bytes] | None = None
        self.family = Family(lambda: [n.process.pid for n in cluster.nodes] + [self.driver.pid] * bool(self.driver))
        self.files_before = shared_memory()
        self.finished = False
        self.unexpected: list[str] = []
        self.starts = 0
        self.expected_end = False
        self.corrupted: tuple[Fault, str, int] | None = None  # the fault, its checkpoint, length of the terminal's text
        self.show: Any = None
        self.restarted: list[tuple[Fault, float]] = []  # a fault is over with the first step after the time
        self.terminal = config.with_name("terminal.txt")

    def start_cluster(self) -> None:
        self.cluster.start_head(cpus=HEAD_CPUS)
        for _ in range(WORKERS):
            self.cluster.start_worker(cpus=WORKER_CPUS)

    def run(self) -> None:
        """Run the same command until the training has finished, whatever ends the driver meanwhile."""
        with progress("chaos", self.steps) as self.show:
            try:
                while not self.finished:
                    self._one_driver()
            except Stuck as stuck:
                self.unexpected.append(str(stuck))
            finally:
                if self.driver and self.driver.poll() is None:
                    kill_tree(self.driver)

    def facts(self) -> dict[str, Any]:
        """Return facts for the report, by name."""
        took = [e["seconds"] for e in self.events.read("gone")]
        return {
            "driver starts": self.starts,
            "processes seen": len(self.family.seen),
            "a dead driver's actors gone after, median s": round(statistics.median(took), 1) if took else None,
        }

    def after_cluster(self) -> list[Check]:
        """Check, after the cluster has ended, that no process and no file in /dev/shm is left."""
        left = survivors(self.family.left)
        files = sorted(shared_memory() - self.files_before)
        ours = [f for f in files if f.startswith("psm_")]
        return [
            Check("no process is left", not left, ", ".join(left[:5]) or f"none of {len(self.family.seen)}"),
            Check("nothing is left in /dev/shm", not ours, f"{len(ours)} message queues, {len(files)} files in all"),
        ]

    def mlflow_run(self) -> str | None:
        """Return the id of the newest MLflow run, or None if there is none."""
        client = MlflowClient(self.mlflow.uri)
        ids = [e.experiment_id for e in client.search_experiments()]
        runs = client.search_runs(ids)
        return runs[0].info.run_id if runs else None

    # Watching one driver.

    def _one_driver(self) -> None:
        """Start a driver, watch it, and cause the faults that are due, until it ends."""
        self.starts += 1
        self.expected_end = False
        with self.terminal.open("ab") as terminal:
            self.driver = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.chaos.faulty_run"),
                    *(str(self.config), str(self.run_dir), str(self.config.with_name("plan.jsonl"))),
                ],
                cwd=ROOT,
                env=environment() | {"RAY_ADDRESS": f"{self.cluster.ip}:{self.cluster.port}"},
                stdout=terminal,
                stderr=subprocess.STDOUT,
            )
        since = time.time()
        while self.driver.poll() is None:
            self._look(since)
            for fault in [f for f in self.pending if f.step <= self._step(since)][:1]:
                self.pending.remove(fault)
                getattr(self, f"_{fault.kind}")(fault)
        code = self.driver.returncode
        self.events.write("end", code=code)
        self.finished = code == 0
        if code and not self.expected_end:
            self.unexpected.append(f"exit status {code} at step {self._step(since)}")
            if len(self.unexpected) > 3:
                raise Stuck("the driver ended again and again")

    def _look(self, since: float) -> None:
        """Watch for a moment: remember processes, and write down which faults are seen or over."""
        time.sleep(0.4)
        self.family.look()
        steps = self.events.read("step", "ready")
        for fault, began in list(self.restarted):
            if any(e["event"] == "step" and e["time"] > began for e in steps):
                self.events.write("over", id=fault.id)
                self.restarted.remove((fault, began))
        self._look_for_fallback()
        self.show.update(self._step(0), faults=float(len(self.events.read("struck"))))
        newest = max([since, *(e["time"] for e in steps)])
        if time.time() - newest > STALL_S:
            raise Stuck(f"no step within {STALL_S:g} s, at step {self._step(0)}")

    def _step(self, since: float) -> int:
        """Return the newest step that was logged after ``since``, or -1."""
        return max((e["step"] for e in self.events.read("step") if e["time"] > since), default=-1)

    def _struck(self, fault: Fault, victim: str) -> None:
        fields = {"id": fault.id, "kind": fault.kind, "step": self._step(0), "stage": "", "victim": victim}
        self.events.write("struck", **fields)

    def _while(self, true: Callable[[], bool], seconds: float) -> bool:
        """Watch while ``true()``, at most ``seconds``. Return whether it became false in time."""
        began = time.time()
        while true() and time.time() - began < seconds:
            self._look(began)
        return not true()

    # The faults from outside, one method for each kind.

    def _driver(self, fault: Fault) -> None:
        assert self.driver is not None
        self.family.look()
        self._struck(fault, f"driver {self.driver.pid}")
        self.expected_end = True
        self.driver.send_signal(signal.SIGKILL)
        began = time.time()
        self.driver.wait(10)
        self.restarted.append((fault, began))
        if left := survivors(self.family.actors_left):
            self.unexpected.append(f"actors outlived a dead driver: {left[:3]}")
        self.events.write("gone", seconds=time.time() - began)

    def _checkpoint(self, fault: Fault) -> None:
        checkpoints = self.run_dir / "checkpoints"
        printed = len(self.terminal.read_bytes())
        self._while(lambda: self._running() and len(list(checkpoints.glob("step-*/state.json"))) < 2, DISK_S)
        self._driver(fault)
        self.corrupted = (fault, corrupt_newest(checkpoints).name, printed)

    def _look_for_fallback(self) -> None:
        """Note it when the next driver has said that the checkpoint is damaged."""
        if self.corrupted is None:
            return
        fault, name, printed = self.corrupted
        words = "".join(self.terminal.read_bytes()[printed:].decode(errors="replace").split())
        if name in words and "damaged" in words:
            self.events.write("seen", id=fault.id)
            self.corrupted = None

    def _mlflow(self, fault: Fault) -> None:
        self._struck(fault, "the MLflow server")
        self.mlflow.kill()
        began = self._step(0)
        self._while(lambda: self._running() and self._step(0) < began + 2, 60)
        if self._while(lambda: self._running() and not self._was_noted("MLflow", fault), 60):
            self.events.write("seen", id=fault.id)
        self.mlflow.start()
        self._while(lambda: self._running() and self._mlflow_step() <= began, 120)
        if self._mlflow_step() > began:
            self.events.write("over", id=fault.id)

    def _node(self, fault: Fault) -> None:
        self.family.look()
        alive = [n for n in self.cluster.nodes[1:] if n.process.poll() is None]
        homes = [n for n in alive if has_actors(n.process.pid)] or alive
        node = homes[fault.number % len(homes)]
        self._struck(fault, f"node {self.cluster.nodes.index(node)}")
        kill_tree(node.process)
        began = time.time()
        self._while(lambda: time.time() - began < NODE_AWAY_S, NODE_AWAY_S)
        self.cluster.start_worker(cpus=WORKER_CPUS)

    def _disk(self, fault: Fault) -> None:
        printed = len(self.terminal.read_bytes())
        self._struck(fault, "the run's disk")
        self.expected_end = True

        def unnoticed() -> bool:
            # Again and again: a save that was under way prunes an old checkpoint, and the next one would have its room.
            self.disk.fill(LEFT_FREE)
            return self._running() and not self._was_noted("checkpoint", fault)

        # The driver reports the full disk, and then either ends or goes on.
        if self._while(unnoticed, DISK_S):
            self._while(self._running, 20)
            words = self.terminal.read_bytes()[printed:].decode(errors="replace")
            if any(w in " ".join(words.split()) for w in ("disk is full", "No space left")):
                self.events.write("seen", id=fault.id)
        self.restarted.append((fault, time.time()))
        self.disk.empty()

    def _running(self) -> bool:
        return self.driver is not None and self.driver.poll() is None

    def _was_noted(self, words: str, fault: Fault) -> bool:
        """Return whether the service has noted ``words`` since the fault."""
        struck = next(e["time"] for e in self.events.read("struck") if e["id"] == fault.id)
        return any(words in e["text"] for e in self.events.read("note") if e["time"] > struck)

    def _mlflow_step(self) -> int:
        """Return the newest step that the server has, or -1."""
        try:
            run_id = self.mlflow_run()
            return int(MlflowClient(self.mlflow.uri).get_run(run_id).data.metrics["trainer/step"]) if run_id else -1
        except (MlflowException, KeyError):
            return -1


def survivors(left: Callable[[], list[str]]) -> list[str]:
    """Return what is left after ``GONE_S`` at most."""
    try:
        gone(left, GONE_S)
    except AssertionError:
        return left()
    return []


def has_actors(pid: int) -> bool:
    """Return whether a node runs engines or ranks, given the pid of its `ray start`."""
    titles = [title(p) for p in psutil.Process(pid).children(recursive=True)]
    return any("ray::VllmEngine" in t or "ray::Rank" in t for t in titles)
