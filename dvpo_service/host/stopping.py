"""A request to stop (SIGTERM, Ctrl-C): a checkpoint of a step boundary first, then a clean end.

At once where nothing is lost by it; in the part of a step that changes the trainers, that step ends
first. A second request ends the run without a checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
INTERRUPTED = "interrupted; the same command continues from the last checkpoint"


class Stopped(BaseException):
    """A person or a scheduler asked the run to end. The message says what was saved.

    No Exception, as KeyboardInterrupt is none; and not that either, which typer takes for itself.
    """

    def __init__(self, message: str, signum: int, *, at_once: bool = False):
        super().__init__(message)
        self.signum, self.at_once = signum, at_once

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that the signal ended: 130 or 143."""
        return 128 + self.signum


def raise_stopped(signum: int, frame: Any = None) -> None:
    """A signal handler for where there is nothing to save."""
    raise Stopped(INTERRUPTED, signum)


class Stopping:
    """Requests to stop a training run. ``tell`` is given a line for the person who waits.

    Without ``listening`` no request comes: a unit test, or a trial of a sweep.
    """

    def __init__(self, tell: Callable[[str], None] = lambda text: None):
        self.tell = tell
        self.requested: int | None = None  # the signal's number
        self._mode: Literal["raise", "when it waits", "after the step"] = "raise"

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Take signals in this block; outside the main thread (a trial of a sweep) none come."""
        global _listening
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.signal(s, self.request) for s in SIGNALS}
        _listening = self
        try:
            yield self
        except SystemError as error:  # what becomes of an exception that a handler raises within Ray's C++ code
            if self.requested is None:
                raise
            raise Stopped(INTERRUPTED, self.requested) from error
        finally:
            _listening = None
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def request(self, signum: int, frame: Any = None) -> None:
        """Ask to stop. A signal handler: it runs in the middle of whatever the main thread does."""
        if self.requested is not None:
            text = "stopped at once; the same command continues from the last checkpoint"
            raise Stopped(text, signum, at_once=True)
        self.requested = signum
        if self._mode == "raise":
            raise_stopped(signum)
        if self._mode == "after the step":
            self.tell("stopping after the step under way; once more ends at once, without a checkpoint")

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The training steps: a request waits for the next ``at_boundary``, or for the end of the last step."""
        self._mode = "after the step"
        yield from numbers
        self._mode = "raise"
        if self.requested is not None:
            raise Stopped("stopping: the last step is saved; the same command exports the policy", self.requested)

    @contextmanager
    def at_boundary(self, step: int, save: Callable[[], object]) -> Iterator[None]:
        """Work that leaves the trainers as they were after ``step``: a request ends its waiting and saves.

        Raises Stopped once ``save`` has returned; for a request that came before, without starting the work.
        """
        self._mode = "when it waits"
        try:
            self.raise_if_asked()
            yield
            self.raise_if_asked()
        except Stopped as stopped:
            if stopped.at_once:
                raise
            self._mode = "after the step"
            self.tell(f"stopping: writing the checkpoint of step {step}")
            save()
            raise Stopped(
                f"stopping: checkpoint at step {step} written; the same command continues", stopped.signum
            ) from None
        finally:
            self._mode = "after the step"

    def raise_if_asked(self) -> None:
        """Raise Stopped where a request need not wait."""
        if self.requested is not None and self._mode != "after the step":
            raise_stopped(self.requested)


# A process has one set of signal handlers.
_listening: Stopping | None = None


def check() -> None:
    """For code that waits, again and again: raises Stopped when a request has come that may end its waiting.

    Never raised from a handler there: a call that is half made (some ranks have it, others not) would hang them.
    """
    if _listening is not None and threading.current_thread() is threading.main_thread():
        _listening.raise_if_asked()
