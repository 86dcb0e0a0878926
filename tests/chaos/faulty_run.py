"""A training run that kills its own processes at chosen moments.

``python -m tests.chaos.faulty_run CONFIG RUN_DIR PLAN``: PLAN is a JSON list of ``{"step", "at", "victim",
"after_s"}``: at the start of stage ``at`` (generate, update, push) of ``step``, wait ``after_s`` seconds and
SIGKILL ``victim``: engine:I, core:I (vLLM's own process of it), policy:I or critic:I; hang:I stops engine I's own
process instead (SIGSTOP). What was done goes to RUN_DIR/faults.jsonl, when the service saw it to RUN_DIR/seen.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from actors.recovery import Recovery
from actors.stream import SyncStream
from actors.supervisor import Supervisor
from actors.trainers import PolicyPool
from actors.weight_sync import WeightSync
from dvpo_service import launch
from dvpo_service.config import load_config


@dataclass
class Injector:
    """Kills by the plan, each fault once."""

    plan: list[dict[str, Any]]
    log: Path
    pools: Any = None
    running: dict[str, int] = field(default_factory=dict)  # stages under way

    def wrap(self, owner: Any, method: str, stage: str, step_of: Callable[..., int]) -> None:
        original = getattr(owner, method)

        def wrapped(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.begin(stage, step_of(*args, **kwargs))
            self.running[stage] = self.running.get(stage, 0) + 1
            try:
                return original(this, *args, **kwargs)
            finally:
                self.running[stage] -= 1

        setattr(owner, method, wrapped)

    def watch(self, owner: Any, method: str) -> None:
        """Log when the service saw a loss."""
        original = getattr(owner, method)

        def wrapped(this: Any, *args: Any) -> Any:
            with self.log.with_name("seen.jsonl").open("a") as file:
                file.write(json.dumps({"by": owner.__name__, "what": str(args), "time": time.time()}) + "\n")
            return original(this, *args)

        setattr(owner, method, wrapped)

    def begin(self, stage: str, step: int) -> None:
        for fault in [f for f in self.plan if f["at"] == stage and f["step"] == step]:
            self.plan.remove(fault)
            pid = self.find(fault["victim"])
            threading.Thread(target=self.kill, args=(fault, pid), daemon=True).start()

    def find(self, victim: str) -> int:
        kind, number = victim.split(":")
        pool = {"engine": "engines", "core": "engines", "hang": "engines"}.get(kind, kind)
        actor = getattr(self.pools, pool).actors[int(number)]
        pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        if kind not in ("core", "hang"):
            return pid
        [core] = [p for p in psutil.Process(pid).children() if "EngineCore" in " ".join([p.name(), *p.cmdline()])]
        return core.pid

    def kill(self, fault: dict[str, Any], pid: int) -> None:
        time.sleep(fault["after_s"])
        during = self.running.get(fault["at"], 0) > 0
        os.kill(pid, signal.SIGSTOP if fault["victim"].startswith("hang") else signal.SIGKILL)
        with self.log.open("a") as file:
            file.write(json.dumps(fault | {"pid": pid, "during": during, "time": time.time()}) + "\n")


def main(config: str, run_dir: str, plan: str) -> None:
    injector = Injector(json.loads(plan), Path(run_dir) / "faults.jsonl")
    start_pools = launch.start_pools

    def started(*args: Any) -> Any:
        injector.pools = start_pools(*args)
        return injector.pools

    launch.start_pools = started  # type: ignore[assignment]
    injector.watch(Supervisor, "lost")
    injector.watch(Recovery, "_grant")
    injector.wrap(SyncStream, "_generate", "generate", lambda step: step)
    injector.wrap(PolicyPool, "update_async", "update", lambda rollouts, advantages, step: step)
    injector.wrap(WeightSync, "push", "push", lambda version: version)
    launch.train(load_config(config), Path(run_dir))


if __name__ == "__main__":
    main(*sys.argv[1:])
