"""Calls to a tracking server, in order, on one background thread, surviving its outages."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dvpo_service.errors import one_line


@dataclass(frozen=True, eq=False)
class _Job:
    label: str
    call: Callable[[], None]
    keep: bool


class Outbox:
    """The training loop hands calls in and goes on; this thread makes them, oldest first.

    A failed call with ``keep`` stays at the head and is tried again when the next one comes, so
    what arrives later never overtakes it. Any other failed call is left out. Both are counted, and
    ``warn`` is told once per outage. At most ``limit`` calls wait; beyond that the oldest one that
    need not be kept goes, or else the oldest.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        hopeless: Callable[[Exception], bool] = lambda error: False,
        name: str = "calls",
        limit: int = 10_000,
    ) -> None:
        self.failures = 0
        self.dropped = 0
        self._warn = warn
        self._hopeless = hopeless  # errors that trying again cannot mend
        self._limit = limit
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._blocked = False  # the head failed; wait for a newer job before it is tried again
        self._outage = False
        self._thread = threading.Thread(target=self._run, name=f"dvpo-tracking-{name}", daemon=True)
        self._thread.start()

    def put(self, label: str, call: Callable[[], None], *, keep: bool = False) -> None:
        """Queue a call. Returns at once."""
        with self._changed:
            self._jobs.append(_Job(label, call, keep))
            if len(self._jobs) > self._limit:
                # Index 0 may be running now; taking it away too is harmless, _settle looks for it.
                victim = next((job for job in self._jobs if not job.keep), self._jobs[0])
                self._jobs.remove(victim)
                self.dropped += 1
            self._blocked = False
            self._changed.notify_all()

    def close(self, deadline_s: float) -> int:
        """Send what waits, for at most ``deadline_s``; the number of calls that were not made."""
        with self._changed:
            self._closing = True
            self._blocked = False
            self._changed.notify_all()
        self._thread.join(deadline_s)
        with self._changed:
            return len(self._jobs)

    def wait_idle(self, timeout_s: float) -> bool:
        """True when nothing waits, or only what failed and waits for the next call."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs or self._blocked, timeout_s)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.call()
            # A tracking server can fail in any way; training must not. Counted and told, not hidden.
            except Exception as error:  # noqa: BLE001
                self._settle(job, error)
            else:
                self._settle(job, None)

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: (self._jobs and not self._blocked) or self._closing)
            if not self._jobs or self._blocked:
                return None  # closing, and nothing left or a last try that failed
            return self._jobs[0]

    def _settle(self, job: _Job, error: Exception | None) -> None:
        with self._changed:
            waits = error is not None and job.keep and not self._hopeless(error)
            if not waits and job in self._jobs:
                self._jobs.remove(job)
            self._blocked = waits
            first = error is not None and not self._outage
            # A failed picture says nothing about the server; only what is kept opens an outage's end.
            self._outage = error is not None or (self._outage and not job.keep)
            if error is not None:
                self.failures += 1
                self.dropped += not waits
            self._changed.notify_all()
        if first:
            again = "kept, sent later" if waits else "left out"
            self._warn(f"MLflow: {job.label} not sent ({again}): {type(error).__name__}: {_line(error)}")


def _line(error: Exception | None) -> str:
    text = one_line(error, None)
    return text if len(text) < 200 else text[:200] + "..."
