"""Keeps the actors of a pool alive: starts them, listens for their heartbeats, replaces the lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.cluster.health import Budget, Fleet
from actors.cluster.pool import PoolError, RestartBudgetExhausted, outcome
from dvpo_service.config import ClusterConfig
from dvpo_service.errors import describe_error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rhythm:
    """``start_s``: deadline of a start. Every ``beat_s`` a heartbeat is asked for, or the last one waited
    for; one that is not answered within ``silence_s`` means that the actor hangs."""

    start_s: float
    beat_s: float
    silence_s: float


def restart_budget(cluster: ClusterConfig) -> Budget:
    return Budget(
        cluster.max_restarts, cluster.restart_window_s, cluster.restart_backoff_s, cluster.restart_backoff_max_s
    )


@dataclass
class _Beat:
    """``unanswered`` counts rounds of the watch, so a driver that slept does not take it for silence."""

    ref: Any
    unanswered: int = 0


class Supervisor:
    """Actors with the methods ``start`` and ``heartbeat``; ``spawn(i)`` makes number i.

    ``actors`` is one list for good, its items are replaced. A thread watches; every state is under one lock. ``note``
    is told a line of every death and return.
    """

    def __init__(
        self,
        name: str,
        size: int,
        spawn: Callable[[int], Any],
        budget: Budget,
        rhythm: Rhythm,
        note: Callable[[str], None] = log.warning,
    ):
        self.name, self.spawn, self.rhythm, self.note = name, spawn, rhythm, note
        self.fleet = Fleet(size, budget)
        self.actors = [spawn(i) for i in range(size)]
        self.recovery_s: list[float] = []
        self._starts: dict[int, tuple[Any, float]] = {}
        self._beats: dict[int, _Beat] = {}
        self._changed = threading.Condition(threading.RLock())
        self._closing = threading.Event()
        self._watch: threading.Thread | None = None
        self._watch_error: Exception | None = None  # nobody is replaced any more

    def start(self) -> None:
        """Begin to start every actor; those that serve already are left alone."""
        with self._changed:
            for i in self.fleet.which("starting"):
                self._begin(i)

    def report_to(self, note: Callable[[str], None]) -> None:
        """Tell ``note`` from now on: the actors of a sweep outlive the run that they were started for."""
        self.note = note

    def wait_started(self) -> None:
        """Until all that ``start`` began serve. The first failure is raised as PoolError: a start that
        fails before anything worked is a mistake in the plan more often than a fault."""
        for i, (ref, deadline) in list(self._starts.items()):
            ray.wait([ref], timeout=max(0.0, deadline - time.monotonic()))
            failure = self._start_failure(ref, deadline)
            if failure is None or failure:
                raise PoolError(self.name, "start", failure or f"no answer within {self.rhythm.start_s:g} s")
            with self._changed:
                del self._starts[i]
                self.fleet.started(i)
        if self._watch is None:
            self._watch = threading.Thread(target=self._run, name=f"watch-{self.name}", daemon=True)
            self._watch.start()

    def serving(self) -> dict[int, Any]:
        """The actors that serve now. Raises RestartBudgetExhausted, and PoolError when the watch itself failed."""
        return self._which("serving")

    def alive(self) -> dict[int, Any]:
        """The actors that have started, whatever weights they hold. Raises RestartBudgetExhausted."""
        return self._which("serving", "stale")

    def is_current(self, i: int, actor: Any) -> bool:
        """Whether ``actor`` is still number ``i`` and may yet answer."""
        with self._changed:
            return self.actors[i] is actor and self.fleet.members[i].state != "dead"

    def advance(self, version: int) -> None:
        with self._changed:
            self.fleet.advance(version)

    def acknowledged(self, i: int, actor: Any, version: int) -> None:
        with self._changed:
            member = self.fleet.members[i]
            if self.actors[i] is not actor or member.state not in ("stale", "serving"):
                return  # it was lost meanwhile
            self.fleet.acknowledged(i, version)
            if member.deaths and self.fleet.members[i].state == "serving":
                self.recovery_s.append(time.monotonic() - member.died_at)
                self.note(f"{self.name} {i} serves again after {self.recovery_s[-1]:.1f} s")
            self._changed.notify_all()

    def lost(self, i: int, actor: Any, cause: str) -> None:
        """Number ``i`` died or hangs: end its processes and, within the budget, start another."""
        with self._changed:
            if not self.is_current(i, actor):
                return  # known already
            now = time.monotonic()
            granted = self.fleet.died(i, cause, now)
            self._starts.pop(i, None)
            self._beats.pop(i, None)
            ray.kill(actor)
            budget = self.fleet.budget
            plan = f"restarting ({self.fleet.used(now)} of {budget.max_restarts})" if granted else "no restart is left"
            self._changed.notify_all()
        self.note(f"{self.name} {i} died ({cause}); {plan}")

    def wait(self, timeout_s: float) -> None:
        """Until some state changed, or ``timeout_s`` passed."""
        with self._changed:
            self._changed.wait(timeout_s)

    def close(self) -> list[Any]:
        """No further restarts; then the owner ends the actors. Those that had started."""
        self._closing.set()
        if self._watch is not None:
            self._watch.join(timeout=10 * self.rhythm.beat_s)
        with self._changed:
            started = [self.actors[i] for i in self.fleet.which("stale", "serving")]
            for i in self.fleet.which("starting", "stale", "serving"):
                self.fleet.drain(i)
        return started

    def metrics(self) -> dict[str, float]:
        """Restarts so far and, once, the seconds from each death to serving again, summed."""
        with self._changed:
            found = {f"pool/restarts/{self.name}": float(self.fleet.restarts)}
            if self.recovery_s:
                found[f"pool/recovery_s/{self.name}"] = sum(self.recovery_s)
                self.recovery_s = []
            return found

    def _which(self, *states: Any) -> dict[int, Any]:
        with self._changed:
            if self._watch_error is not None:
                raise PoolError(self.name, "watch", describe_error(self._watch_error)) from self._watch_error
            if self.fleet.spent:
                cause = next(m.cause for m in self.fleet.members if m.state == "dead" and m.due is None)
                raise RestartBudgetExhausted(self.name, cause, self.fleet.budget.max_restarts)
            return {i: self.actors[i] for i in self.fleet.which(*states)}

    def _begin(self, i: int) -> None:
        self._starts[i] = (self.actors[i].start.remote(), time.monotonic() + self.rhythm.start_s)

    def _run(self) -> None:
        try:
            while not self._closing.wait(self.rhythm.beat_s):
                self._finish_starts()
                self._listen()
                self._restart_due()
        except Exception as error:  # noqa: BLE001 - raised by whoever next asks for an actor, who would wait for ever
            with self._changed:
                self._watch_error = error
                self._changed.notify_all()

    def _finish_starts(self) -> None:
        for i, (ref, deadline) in list(self._starts.items()):
            failure = self._start_failure(ref, deadline)
            if failure is None:
                continue
            if failure:
                self.lost(i, self.actors[i], failure)
                continue
            with self._changed:
                if self._starts.pop(i, None):
                    self.fleet.started(i)
                    self._changed.notify_all()

    def _start_failure(self, ref: Any, deadline: float) -> str | None:
        """Why a start failed; "" when it succeeded, None while it is under way."""
        if ray.wait([ref], timeout=0)[0]:
            found = outcome(ref)
            return "did not start: " + cause_of(found) if isinstance(found, RayError) else ""
        return f"did not start within {self.rhythm.start_s:g} s" if time.monotonic() > deadline else None

    def _listen(self) -> None:
        with self._changed:
            watched = {i: self.actors[i] for i in self.fleet.which("serving", "stale")}
        for i, actor in watched.items():
            beat = self._beats.setdefault(i, _Beat(actor.heartbeat.remote()))
            if ray.wait([beat.ref], timeout=0)[0]:
                found = outcome(beat.ref)
                if isinstance(found, RayError):
                    self.lost(i, actor, cause_of(found))
                self._beats.pop(i, None)
                continue
            beat.unanswered += 1
            if beat.unanswered * self.rhythm.beat_s > self.rhythm.silence_s:
                self.lost(i, actor, f"no heartbeat within {self.rhythm.silence_s:g} s")

    def _restart_due(self) -> None:
        with self._changed:
            for i in self.fleet.due(time.monotonic()):
                self.fleet.restarted(i)
                self.actors[i] = self.spawn(i)
                self._begin(i)


def cause_of(error: RayError) -> str:
    """Why a call failed, for a person."""
    if isinstance(error, RayActorError):
        return f"its process is gone: {describe_error(error, 160)}"
    return describe_error(error.cause) if isinstance(error, RayTaskError) else describe_error(error)
