"""The rollout stream that generates batches ahead while the trainers update (``rollout.max_staleness`` above 0)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from actors.cluster.pool import POLL_S
from actors.rollouts.cache import CachedBatch
from actors.rollouts.engines import Sampler
from actors.rollouts.reward import Rewards
from actors.rollouts.stream import SyncStream
from dvpo_service.config import Config
from dvpo_service.data.cursor import CursorState
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.ledger import Ledger
from dvpo_service.host import stopping
from dvpo_service.types import Generated

log = logging.getLogger(__name__)

_STOP_S = 60.0  # how long an abandoned batch may take to end, besides the deadlines of its rewards


class _Unwanted(Exception):
    """Raised in the thread to abandon the batch that it generates: nobody will ask for it."""


class AheadStream(SyncStream):
    """Generates the batches of the next ``max_staleness`` steps, one after the other, in a thread.

    A batch starts only once its age limit is certain to hold. The loop asks for the batch of step k when every engine
    holds weights k; batch k + max_staleness may start then, since none of its tokens can come from weights older than
    k. Weights that arrive while a batch is generated are used from the next token on. Prompts are assigned to steps in
    the cursor's order, so no prompt is dropped for its age and none is used twice.
    """

    def __init__(self, config: Config, data: Dataset, engines: Sampler, rewards: Rewards, ledger: Ledger):
        super().__init__(config, data, engines, rewards, ledger)
        self.check = self._check
        self._given: CursorState = self.cursor.state_dict()
        self._ahead: dict[int, Future[tuple[CachedBatch, bool]]] = {}
        self._unwanted = threading.Event()
        self._thread = _Thread("rollouts ahead")
        self._stop_s = (
            _STOP_S
            + config.reward.start_timeout_s
            + max(config.reward.timeout_of(part, config.rollout.n) for part in config.reward.parts)
        )

    def next(self, step: int) -> Generated:
        """Return the batch of ``step``, and start the generation of the batches after it that are allowed.

        Raises:
          RestartBudgetExhausted: the engines died too often while this call waited.
          RuntimeError: the batch has tokens that are older than ``max_staleness``.
          Exception: whatever the generation of the batch raised.
        """
        last = min(step + self.config.rollout.max_staleness, self.config.trainer.num_steps - 1)
        for k in range(step, last + 1):
            if k not in self._ahead:
                self._ahead[k] = self._thread.submit(self._make, k)
        began = time.perf_counter()
        while not _done_within(self._ahead[step], POLL_S):
            stopping.check()
            self.engines.revive()
        waited = time.perf_counter() - began
        cached, reused = self._ahead.pop(step).result()
        oldest = int(cached.generated.rollouts.weight_version.min())
        if step - oldest > self.config.rollout.max_staleness:
            raise RuntimeError(f"the batch of step {step} has tokens of weights {oldest}: older than max_staleness")
        self._given = cached.after
        batch = self._give(step, cached, reused)
        return replace(batch, metrics=batch.metrics | {"time/wait": waited})

    def state_dict(self) -> CursorState:
        """Return the cursor's state after the batch that ``next`` returned last; generated batches do not count."""
        return self._given

    def load_state_dict(self, state: CursorState) -> None:
        """Go back to ``state``. Batches generated ahead are dropped, except those in the cache for repeated steps.

        Raises:
          RuntimeError: a batch that is being generated does not end.
        """
        if stuck := self._drop():
            raise RuntimeError(stuck)
        super().load_state_dict(state)
        self._given = self.cursor.state_dict()

    def close(self) -> None:
        """Abandon the batches that are being generated, and end the thread; a thread that hangs is left behind."""
        if stuck := self._drop():
            log.warning("%s; left behind", stuck)
        self._thread.end()

    def _make(self, step: int) -> tuple[CachedBatch, bool]:
        self._check()
        cached, reused = super()._make(step)
        if not reused:
            self.cache.drop_after(step)  # later batches follow a course of the run that was abandoned
        return cached, reused

    def _drop(self) -> str | None:
        """Abandon all batches and wait until the thread is idle. Return which batch does not end, if any.

        A scoring call ends at its own deadline; everything else ends at once.
        """
        self._unwanted.set()
        deadline = time.monotonic() + self._stop_s
        for step, future in self._ahead.items():
            if not future.cancel() and not _done_within(future, deadline - time.monotonic()):
                return (
                    f"rollouts ahead: the batch of step {step + 1} did not stop within {self._stop_s:g} s: an engine "
                    "or a reward worker does not answer"
                )
        self._ahead = {}
        self._unwanted.clear()
        return None

    def _check(self) -> None:
        if self._unwanted.is_set():
            raise _Unwanted


class _Thread:
    """Runs calls one after the other in a daemon thread, which cannot keep the process from ending."""

    def __init__(self, name: str):
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue ``function(*arguments)``."""
        future: Future[Any] = Future()
        self._calls.put((future, lambda: function(*arguments)))
        return future

    def end(self) -> None:
        """End the thread after the call that is running; do not wait for it."""
        self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever asks for the batch gets it
                future.set_exception(error)


def _done_within(future: Future[Any], seconds: float) -> bool:
    """Wait ``seconds`` at most, and return whether the future has a result or an error."""
    try:
        future.exception(max(0.0, seconds))
    except TimeoutError:
        return False
    return True
