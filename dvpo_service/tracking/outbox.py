"""Make the calls to a tracking server in order, on one background thread, through outages of the server."""

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
    """A queue of calls and the thread that makes them, oldest first. The training loop never waits for a call.

    A call with ``keep`` that fails stays at the head of the queue and is tried again when the next call is queued, so
    later calls never overtake it. Any other call that fails is dropped.

    Args:
      warn: called with a message once per outage, on the queue's thread.
      hopeless: returns whether an error is permanent, so that trying again cannot succeed; such calls are dropped.
      name: of the thread.
      limit: at most this many calls wait. When there are more, the oldest call without ``keep`` is dropped, or the
        oldest call if all have ``keep``.

    Attributes:
      failures: the number of attempts that failed.
      dropped: the number of calls that were dropped.
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
        self._hopeless = hopeless
        self._limit = limit
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._blocked = False  # the head failed: it is tried again when a new job arrives
        self._outage = False
        self._thread = threading.Thread(target=self._run, name=f"dvpo-tracking-{name}", daemon=True)
        self._thread.start()

    def put(self, label: str, call: Callable[[], None], *, keep: bool = False) -> None:
        """Queue a call, and return at once.

        Args:
          label: names the call in warnings.
          call: what to do, on the queue's thread.
          keep: try again after a failure.
        """
        with self._changed:
            self._jobs.append(_Job(label, call, keep))
            if len(self._jobs) > self._limit:
                # The job at index 0 may be running. It can be removed too: _settle checks whether it is there.
                victim = next((job for job in self._jobs if not job.keep), self._jobs[0])
                self._jobs.remove(victim)
                self.dropped += 1
            self._blocked = False
            self._changed.notify_all()

    def close(self, deadline_s: float) -> int:
        """Make the calls that wait, for at most ``deadline_s`` seconds; return the number of calls not made."""
        with self._changed:
            self._closing = True
            self._blocked = False
            self._changed.notify_all()
        self._thread.join(deadline_s)
        with self._changed:
            return len(self._jobs)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.call()
            # A tracking server can fail in any way, and training must go on. Failures are counted and warned about.
            except Exception as error:  # noqa: BLE001
                self._settle(job, error)
            else:
                self._settle(job, None)

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: (self._jobs and not self._blocked) or self._closing)
            if not self._jobs or self._blocked:
                return None  # closing: nothing is left, or the last attempt failed
            return self._jobs[0]

    def _settle(self, job: _Job, error: Exception | None) -> None:
        with self._changed:
            waits = error is not None and job.keep and not self._hopeless(error)
            if not waits and job in self._jobs:
                self._jobs.remove(job)
            self._blocked = waits
            first = error is not None and not self._outage
            # A call without keep, such as a drawing, says nothing about the server: only one with keep ends an outage.
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
