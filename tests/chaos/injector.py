"""Cause planned faults from within a driver, and write the service's reactions to ``events.jsonl``."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from actors.cluster.health import Fleet
from actors.cluster.supervisor import Supervisor
from actors.rollouts.ahead import AheadStream
from actors.rollouts.reward import Work
from actors.rollouts.reward_pool import RewardPool
from actors.rollouts.stream import SyncStream
from actors.training.recovery import Recovery
from actors.training.roles import CriticEstimator, PolicyRanks
from actors.weights.sync import SyncedEngines
from dvpo_service import terminal
from dvpo_service.commands import train
from dvpo_service.commands.assemble import Pools
from dvpo_service.tracking.tracker import Tracker
from dvpo_service.types import Score
from tests.chaos.events import Events
from tests.chaos.faults import KINDS, NAN, Fault
from tests.chaos.poison import poison
from tests.chaos.rewards import marked

FIND_S = 60.0
# The last steps wait for the faults of the harness: for it, the start of a server takes longer than a step.
HOLD_STEPS, HOLD_S = 8, 60.0


class Injector:
    """Causes the faults of ``plan``, without those that are in the events already, unless they repeat."""

    def __init__(self, plan: Sequence[Fault], events: Events, steps: int):
        struck = {e["id"] for e in events.read("struck")}
        mine = [f for f in plan if KINDS[f.kind].at]
        self.steps_own = [f for f in mine if KINDS[f.kind].repeats]
        self.others = {f.id for f in plan if not KINDS[f.kind].at}  # faults of the harness
        self.last_steps = range(steps - HOLD_STEPS, steps)
        self.pending = [f for f in mine if not KINDS[f.kind].repeats and f.id not in struck]
        self.reported = struck  # ids of faults in the events: a fault that repeats is counted once
        self.events = events
        self.pools: Pools | None = None
        self.step = 0
        self.running: dict[str, int] = {}  # how many times each stage is under way
        self.skipping: list[Fault] = []  # NaN faults that have struck and are not yet over
        self.seen: set[int] = set()
        self.replaced: set[int] = set()  # reward workers that have not scored since
        self.marks: dict[tuple[int, int], Fault] = {}  # by prompt and sample, in the current scoring

    def install(self) -> None:
        """Wrap the methods in which the stages of a step begin, and those in which the service notices and recovers."""
        around(train, "start_pools", self.started)
        for stream in (SyncStream, AheadStream):
            around(stream, "next", self.next_step)
        around(SyncStream, "_generate", self.stage("generate"))
        around(RewardPool, "score", self.scoring)
        around(PolicyRanks, "logprobs_async", self.stage("logprobs"))
        around(CriticEstimator, "advantages", self.stage("advantages"))
        around(CriticEstimator, "update_async", self.stage("update"))
        around(SyncedEngines, "push", self.stage("push"))
        around(Tracker, "log", self.logged)
        around(terminal.TrainingDisplay, "note", self.noted)
        around(Supervisor, "lost", self.lost)
        around(Recovery, "_grant", self.granting)
        around(RewardPool, "_replace", self.replacing)
        around(Recovery, "recover", self.recovered)
        around(Supervisor, "acknowledged", self.acknowledged)
        around(Fleet, "restarted", self.of_engines("starting"))
        around(Fleet, "started", self.of_engines("started"))

    # Where faults strike.

    def started(self, call: Callable[[], Any], *_: Any, **__: Any) -> Any:
        self.pools = call()
        self.events.write("ready", pid=os.getpid())
        return self.pools

    def next_step(self, call: Callable[[], Any], stream: Any, step: int) -> Any:
        self.step = step
        until = time.monotonic() + HOLD_S if step in self.last_steps else 0.0
        while time.monotonic() < until and self.others - {e["id"] for e in self.events.read("struck")}:
            time.sleep(0.5)
        return call()

    def stage(self, name: str) -> Callable[..., Any]:
        def during(call: Callable[[], Any], *_: Any, **__: Any) -> Any:
            self.begin(name)
            with self.under_way(name):
                return call()

        return during

    def scoring(
        self, call: Callable[[], list[list[Score]]], pool: RewardPool, groups: Sequence[Work], *, noisy: bool
    ) -> list[list[Score]]:
        if not noisy:
            return call()
        self.begin("score")
        self.marks = {}
        for fault in self.due("score"):
            texts = groups[fault.number % len(groups)].responses
            sample = fault.number // len(groups) % len(texts)
            texts[sample] = marked(fault.kind)
            self.marks[fault.number % len(groups), sample] = fault
            self.tell(fault, f"sample {sample} of prompt {fault.number % len(groups)}", during=True)
        scores = call()
        for (group, sample), fault in self.marks.items():
            if scores[group][sample].error is not None:
                self.events.write("seen", id=fault.id, why=scores[group][sample].error)
                self.events.write("over", id=fault.id)
        for i in self.replaced - pool.fresh:
            self.events.write("back", pool="reward", number=i)
        self.replaced &= pool.fresh
        return scores

    def begin(self, stage: str) -> None:
        """Cause the faults that are due. A fault whose victim is not there now waits for the next time."""
        assert self.pools, "stages begin when the pools are there"
        for fault in [f for f in self.due(stage) if f.kind in NAN]:
            pool = self.pools.trainers[KINDS[fault.kind].pool]
            number = fault.number % len(pool.actors)
            ray.get(pool.actors[number].__ray_call__.remote(poison), timeout=FIND_S)
            self.tell(fault, f"{pool.name} {number}", during=True)
            self.skipping = [f for f in self.skipping if f != fault] + [fault]
        for fault in [f for f in self.pending if f.at == stage and f.step <= self.step]:
            victim = self.find(fault)
            if victim:
                self.pending.remove(fault)
                strike = threading.Thread(target=self.kill, args=(fault, *victim), daemon=True)
                strike.start()
                if stage == "score":  # scoring takes milliseconds, and afterwards the victim has no work
                    strike.join(FIND_S)

    def due(self, stage: str) -> list[Fault]:
        return [f for f in self.steps_own if f.at == stage and f.step == self.step]

    def find(self, fault: Fault) -> tuple[int, int] | None:
        """Return the victim's number and pid, or None if it is not there."""
        assert self.pools, "stages begin when the pools are there"
        engines = self.pools.engines.supervisor
        if fault.kind in ("engine", "engine-idle", "core", "hang"):
            numbers, actors = engines.fleet.which("serving"), engines.actors
        else:
            group = self.pools.trainers.get(fault.kind)
            actors = group.actors if group else self.pools.rewards.workers
            numbers = list(range(len(actors)))
        if not numbers:
            return None
        number = numbers[fault.number % len(numbers)]
        try:
            pid = ray.get(actors[number].__ray_call__.remote(lambda _: os.getpid()), timeout=FIND_S)
            if fault.kind in ("core", "hang"):
                pid = next(p.pid for p in psutil.Process(pid).children() if "EngineCore" in " ".join(p.cmdline()))
        except (RayError, psutil.NoSuchProcess, StopIteration):
            return None  # another fault came first
        return number, pid

    def kill(self, fault: Fault, number: int, pid: int) -> None:
        time.sleep(fault.after_s)
        during = self.running.get(fault.at, 0) > 0
        self.tell(fault, f"{KINDS[fault.kind].pool} {number}", during=during, pid=pid, number=number)
        os.kill(pid, signal.SIGSTOP if fault.kind == "hang" else signal.SIGKILL)

    def tell(self, fault: Fault, victim: str, **more: Any) -> None:
        if fault.id not in self.reported:
            self.reported.add(fault.id)
            fields = {"id": fault.id, "kind": fault.kind, "step": self.step, "stage": fault.at, "victim": victim}
            self.events.write("struck", **fields, **more)

    @contextmanager
    def under_way(self, stage: str) -> Any:
        self.running[stage] = self.running.get(stage, 0) + 1
        try:
            yield
        finally:
            self.running[stage] -= 1

    # The reactions of the service.

    def logged(self, call: Callable[[], Any], tracker: Any, step: int, metrics: dict[str, float]) -> Any:
        done = call()
        skipped = [p for p in ("policy", "critic") if metrics.get(f"{p}/skipped_steps")]
        self.events.write("step", step=step, skipped=skipped, failed=metrics.get("reward/failed", 0.0))
        for fault in list(self.skipping):
            if KINDS[fault.kind].pool in skipped:
                self.seen.add(fault.id)
                self.events.write("seen", id=fault.id)
            elif fault.id in self.seen:
                self.skipping.remove(fault)
                self.events.write("over", id=fault.id)
        return done

    def noted(self, call: Callable[[], Any], display: Any, text: str) -> Any:
        self.events.write("note", text=text)
        return call()

    def lost(self, call: Callable[[], Any], supervisor: Supervisor, i: int, actor: Any, cause: str) -> Any:
        if supervisor.is_current(i, actor):
            self.events.write("lost", pool=supervisor.name, number=i, cause=cause)
        return call()

    def granting(self, call: Callable[[], Any], recovery: Recovery, error: Any) -> Any:
        self.events.write("lost", pool=error.pool, number=0, cause=error.cause)
        return call()

    def replacing(self, call: Callable[[], Any], pool: RewardPool, i: int, why: str) -> Any:
        self.replaced.add(i)
        self.events.write("lost", pool="reward", number=i, cause=why)
        for (group, _), fault in self.marks.items():
            if fault.kind == "reward-hang" and group % len(pool.workers) == i:
                self.events.write("seen", id=fault.id, why=why)
        return call()

    def recovered(self, call: Callable[[], Any], recovery: Recovery, error: Any) -> Any:
        state = call()
        for pool in recovery.restarts.recovery_s:
            self.events.write("back", pool=pool, number=0)
        return state

    def acknowledged(self, call: Callable[[], Any], supervisor: Supervisor, i: int, *_: Any) -> Any:
        recoveries = len(supervisor.recovery_s)
        call()
        if len(supervisor.recovery_s) > recoveries:
            self.events.write("back", pool="rollout", number=i)

    def of_engines(self, event: str) -> Callable[..., Any]:
        def before(call: Callable[[], Any], fleet: Any, i: int) -> Any:
            if self.pools and fleet is self.pools.engines.supervisor.fleet:
                self.events.write(event, pool="rollout", number=i)
            return call()

        return before


def around(owner: Any, method: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.method(*args)`` by ``wrapper(call, *args)``, where ``call()`` runs the original method."""
    original = getattr(owner, method)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(lambda: original(*args, **kwargs), *args, **kwargs)

    setattr(owner, method, wrapped)
