"""The supervisor of a pool: it starts the actors, watches their heartbeats and restarts those that are lost."""

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
    """The intervals and deadlines of supervision, in seconds.

    Attributes:
      start_s: deadline of an actor's start.
      beat_s: interval between two rounds of the watch. Each round sends an actor a heartbeat request, or checks the
        request that is still open: an actor has one open request at most.
      silence_s: how long a heartbeat request may stay unanswered. After that the actor counts as hanging and is lost.
    """

    start_s: float
    beat_s: float
    silence_s: float


def restart_budget(cluster: ClusterConfig) -> Budget:
    """Return the restart budget of a pool, as the cluster's config sets it."""
    return Budget(
        cluster.max_restarts, cluster.restart_window_s, cluster.restart_backoff_s, cluster.restart_backoff_max_s
    )


@dataclass
class _Beat:
    """An open heartbeat request: its Ray reference, and the rounds of the watch in which it was unanswered.

    It counts rounds, not seconds: after a driver that slept wakes up, its actors must not seem to have been silent.
    """

    ref: Any
    unanswered: int = 0


class Supervisor:
    """Supervises actors that have the methods ``start`` and ``heartbeat``.

    A thread, the watch, finishes starts, checks heartbeats and restarts lost actors within the budget. One lock guards
    all state. ``actors`` stays the same list; a restart replaces an item of it.

    Args:
      name: the pool's name, for messages and metrics.
      size: number of actors.
      spawn: creates the Ray actor of a number from 0 to ``size - 1``.
      budget: how many restarts are allowed.
      rhythm: intervals and deadlines.
      note: gets one line when an actor dies, and one when it serves again.
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
        self._watch_error: Exception | None = None  # once set, nothing is restarted any more

    def start(self) -> None:
        """Begin to start every actor that has not started yet. Return at once; see ``wait_started``."""
        with self._changed:
            for i in self.fleet.which("starting"):
                self._begin(i)

    def report_to(self, note: Callable[[str], None]) -> None:
        """Send lines to ``note`` from now on. The engines of a sweep outlive the run that they were started for."""
        self.note = note

    def wait_started(self) -> None:
        """Wait until every actor that ``start`` began has started, then begin the watch.

        Raises:
          PoolError: an actor failed to start. The first failure ends the wait, without a restart: a start that fails
            before anything worked is more often a mistake in the config than a fault.
        """
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
        """Return the actors that serve now, by number.

        Raises:
          RestartBudgetExhausted: an actor died when no restart was left.
          PoolError: the watch itself failed.
        """
        return self._which("serving")

    def alive(self) -> dict[int, Any]:
        """Return the actors that have started, by number, whatever weights they hold. Raises as ``serving`` does."""
        return self._which("serving", "stale")

    def is_current(self, i: int, actor: Any) -> bool:
        """Return whether ``actor`` is still the one with number ``i`` and is not known to be dead."""
        with self._changed:
            return self.actors[i] is actor and self.fleet.members[i].state != "dead"

    def advance(self, version: int) -> None:
        """Set the weight version to serve. No actor serves until it has acknowledged that version."""
        with self._changed:
            self.fleet.advance(version)

    def acknowledged(self, i: int, actor: Any, version: int) -> None:
        """Record that actor number ``i`` holds weights ``version``; it serves if that is the version to serve.

        An acknowledgement from an actor that was lost or replaced meanwhile is ignored.
        """
        with self._changed:
            member = self.fleet.members[i]
            if self.actors[i] is not actor or member.state not in ("stale", "serving"):
                return  # the actor was lost meanwhile
            self.fleet.acknowledged(i, version)
            if member.deaths and self.fleet.members[i].state == "serving":
                self.recovery_s.append(time.monotonic() - member.died_at)
                self.note(f"{self.name} {i} serves again after {self.recovery_s[-1]:.1f} s")
            self._changed.notify_all()

    def lost(self, i: int, actor: Any, cause: str) -> None:
        """Record that actor number ``i`` died or hangs, and kill it.

        The watch starts another after the back-off, if the budget grants a restart. A loss that is known already is
        ignored.
        """
        with self._changed:
            if not self.is_current(i, actor):
                return
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
        """Wait until an actor's state changes, for ``timeout_s`` seconds at most."""
        with self._changed:
            self._changed.wait(timeout_s)

    def close(self) -> list[Any]:
        """End the watch, so that nothing is restarted, and return the actors that had started.

        The caller ends the actors.
        """
        self._closing.set()
        if self._watch is not None:
            self._watch.join(timeout=10 * self.rhythm.beat_s)
        with self._changed:
            started = [self.actors[i] for i in self.fleet.which("stale", "serving")]
            for i in self.fleet.which("starting", "stale", "serving"):
                self.fleet.drain(i)
        return started

    def metrics(self) -> dict[str, float]:
        """Return the number of restarts so far and, if actors recovered since the last call, the seconds it took.

        A recovery lasts from an actor's first death until it serves again; the seconds are summed over recoveries.
        """
        with self._changed:
            metrics = {f"pool/restarts/{self.name}": float(self.fleet.restarts)}
            if self.recovery_s:
                metrics[f"pool/recovery_s/{self.name}"] = sum(self.recovery_s)
                self.recovery_s = []
            return metrics

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
        except Exception as error:  # noqa: BLE001 - the next call of ``serving`` raises it, and does not wait for ever
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
        """Return why a start failed, "" if it succeeded, or None while it is under way."""
        if ray.wait([ref], timeout=0)[0]:
            result = outcome(ref)
            return "did not start: " + cause_of(result) if isinstance(result, RayError) else ""
        return f"did not start within {self.rhythm.start_s:g} s" if time.monotonic() > deadline else None

    def _listen(self) -> None:
        with self._changed:
            watched = {i: self.actors[i] for i in self.fleet.which("serving", "stale")}
        for i, actor in watched.items():
            # ``lost``, in another thread, may remove the beat meanwhile.
            beat = self._beats.get(i) or _Beat(actor.heartbeat.remote())
            self._beats[i] = beat
            if ray.wait([beat.ref], timeout=0)[0]:
                result = outcome(beat.ref)
                if isinstance(result, RayError):
                    self.lost(i, actor, cause_of(result))
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
    """Return why a call failed, as text for a person."""
    if isinstance(error, RayActorError):
        return f"its process is gone: {describe_error(error, 160)}"
    return describe_error(error.cause) if isinstance(error, RayTaskError) else describe_error(error)
