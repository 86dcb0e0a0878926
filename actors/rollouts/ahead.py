"""The rollout stream that generates batches ahead while the trainers update (``rollout.max_staleness`` above 0)."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from actors.cluster.pool import POLL_S
from actors.rollouts.cache import CachedBatch
from actors.rollouts.engines import Sampler
from actors.rollouts.reward_pool import RewardPool
from actors.rollouts.stream import SyncStream
from dvpo_service.config import Config
from dvpo_service.data.cursor import CursorState
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.ledger import Ledger
from dvpo_service.host import stopping
from dvpo_service.types import Generated


class _Unwanted(Exception):
    """Raised in the thread to abandon the batch that it generates: nobody will ask for it."""


class AheadStream(SyncStream):
    """Generates the batches of the next ``max_staleness`` steps, one after the other, in a thread.

    A batch starts only once its age limit is certain to hold. The loop asks for the batch of step k when every engine
    holds weights k; batch k + max_staleness may start then, since none of its tokens can come from weights older than
    k. Weights that arrive while a batch is generated are used from the next token on. Prompts are assigned to steps in
    the cursor's order, so no prompt is dropped for its age and none is used twice.
    """

    def __init__(self, config: Config, data: Dataset, engines: Sampler, rewards: RewardPool, ledger: Ledger):
        super().__init__(config, data, engines, rewards, ledger)
        self.check = self._check
        self._given: CursorState = self.cursor.state_dict()
        self._ahead: dict[int, Future[tuple[CachedBatch, bool]]] = {}
        self._unwanted = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts ahead")

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
        """Go back to ``state``. Batches generated ahead are dropped, except those in the cache for repeated steps."""
        self._drop()
        super().load_state_dict(state)
        self._given = self.cursor.state_dict()

    def close(self) -> None:
        """Abandon the batches that are being generated, and end the thread."""
        self._drop()
        self._thread.shutdown()

    def _make(self, step: int) -> tuple[CachedBatch, bool]:
        self._check()
        cached, reused = super()._make(step)
        if not reused:
            self.cache.drop_after(step)  # later batches follow a course of the run that was abandoned
        return cached, reused

    def _drop(self) -> None:
        """Abandon all batches and wait until the thread is idle.

        A scoring call ends at its own deadline; everything else ends at once.
        """
        self._unwanted.set()
        for future in self._ahead.values():
            future.cancel()
            if not future.cancelled():
                future.exception()
        self._ahead = {}
        self._unwanted.clear()

    def _check(self) -> None:
        if self._unwanted.is_set():
            raise _Unwanted


def _done_within(future: Future[Any], seconds: float) -> bool:
    """Wait ``seconds`` at most, and return whether the future has a result or an error."""
    try:
        future.exception(seconds)
    except TimeoutError:
        return False
    return True
