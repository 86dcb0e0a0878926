"""A request to stop (SIGTERM, Ctrl-C) saves a checkpoint at a step boundary and then ends the run.

The run stops at once where nothing is lost by that. In the part of a step that changes the trainers, the step is
finished first. A second request ends the run without a checkpoint.
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

    Like KeyboardInterrupt it is no Exception, so that ``except Exception`` lets it through. It does not derive from
    KeyboardInterrupt, which typer handles itself.
    """

    def __init__(self, message: str, signum: int, *, at_once: bool = False):
        super().__init__(message)
        self.signum = signum
        self.at_once = at_once

    @property
    def exit_code(self) -> int:
        """The code that a shell reports for a process that the signal ended: 130 or 143."""
        return 128 + self.signum


def raise_stopped(signum: int, frame: Any = None) -> None:
    """Raise Stopped. A signal handler for code that has nothing to save."""
    raise Stopped(INTERRUPTED, signum)


class Stopping:
    """Requests to stop a training run.

    Requests arrive only inside ``listening``. A unit test or a trial of a sweep goes without it.

    Args:
      tell: called with a line for the person who waits for the end.
    """

    def __init__(self, tell: Callable[[str], None] = lambda text: None):
        self.tell = tell
        self.requested: int | None = None  # the signal's number
        self._mode: Literal["raise", "when it waits", "after the step"] = "raise"

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Handle signals in this block. Outside the main thread (a trial of a sweep) this does nothing."""
        global _listening
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {s: signal.signal(s, self.request) for s in SIGNALS}
        _listening = self
        try:
            yield self
        except SystemError as error:  # Ray's C++ code turns an exception of a handler into this
            if self.requested is None:
                raise
            raise Stopped(INTERRUPTED, self.requested) from error
        finally:
            _listening = None
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def request(self, signum: int, frame: Any = None) -> None:
        """Ask the run to stop. As a signal handler this can run at any point of the main thread."""
        if self.requested is not None:
            text = "stopped at once; the same command continues from the last checkpoint"
            raise Stopped(text, signum, at_once=True)
        self.requested = signum
        if self._mode == "raise":
            raise_stopped(signum)
        if self._mode == "after the step":
            self.tell("stopping after the step under way; once more ends at once, without a checkpoint")

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield the training steps. A request waits for the next ``at_boundary``, or for the end of the last step."""
        self._mode = "after the step"
        yield from numbers
        self._mode = "raise"
        if self.requested is not None:
            raise Stopped("stopping: the last step is saved; the same command exports the policy", self.requested)

    @contextmanager
    def at_boundary(self, step: int, save: Callable[[], object]) -> Iterator[None]:
        """Run a block that leaves the trainers as they were after ``step``. A request ends its waiting and saves.

        If a request came before the block, the block is not started.

        Raises:
          Stopped: after a request, once ``save`` has returned.
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
        """Raise Stopped if a request has come that need not wait for the end of the step."""
        if self.requested is not None and self._mode != "after the step":
            raise_stopped(self.requested)


# A process has one set of signal handlers.
_listening: Stopping | None = None


def check() -> None:
    """Raise Stopped if a request has come that may end the caller's waiting. Code that waits calls this repeatedly.

    Waiting code stops here rather than in the signal handler: a handler could interrupt a call that only some ranks
    have received, and they would hang.
    """
    if _listening is not None and threading.current_thread() is threading.main_thread():
        _listening.raise_if_asked()
