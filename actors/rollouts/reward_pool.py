"""Dispatch of scoring calls: each has a deadline, and a bad one costs its own samples only."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.cluster.placement import Placement
from actors.cluster.pool import PoolError, wait_for
from actors.rollouts.reward import RewardWorker, Work
from dvpo_service.config import RewardConfig
from dvpo_service.errors import one_line
from dvpo_service.types import Score

log = logging.getLogger(__name__)

START_TRIES = 3


class RewardPool:
    """CPU actors that score, a group a call. One that misses its deadline or kills its process is tried once more,
    in a fresh process; what fails again is marked failed, never 0. Workers that have nothing to do are watched too."""

    def __init__(self, config: RewardConfig, placement: Placement, note: Callable[[str], None] = log.warning):
        self.config, self.placement, self.note = config, placement, note
        self.restarts = 0
        self.workers = [self._spawn(i) for i in range(config.num_workers)]
        self.fresh = set(range(config.num_workers))  # spawned, and not heard of yet
        self._idle = threading.Lock()  # held by whoever calls the workers
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="reward watch", daemon=True)

    def wait_ready(self, timeout_s: float) -> None:
        """Raise PoolError when a worker cannot load the reward function on its node."""
        try:
            wait_for([w.ready.remote() for w in self.workers], timeout_s)
            self.fresh.clear()
            self._watching.start()
        except GetTimeoutError as error:
            raise PoolError("reward", "start", f"no answer within {timeout_s:g} s") from error
        except RayActorError as error:
            why = str(error).strip().splitlines()[-1]
            raise PoolError(
                "reward", "start", f"{why} On a cluster, submit the job with --working-dir, so that your module travels"
            ) from error

    def score(self, groups: Sequence[Work], *, noisy: bool) -> list[list[Score]]:
        """One list of scores per group, in order. Raises PoolError when no worker can be started."""
        with self._idle:
            for i in list(self.fresh):
                self._await_start(i)
            shares = {i: list(range(i, len(groups), len(self.workers))) for i in range(len(self.workers))}
            calls = {i: self._submit(i, groups, share, noisy) for i, share in shares.items()}
            scores = {g: score for i in calls for g, score in self._collect(i, calls[i], groups, noisy).items()}
            return [scores[g] for g in range(len(groups))]

    def shutdown(self) -> None:
        self._closing.set()
        self._kill()  # which also ends a heartbeat that waits
        if self._watching.is_alive():
            self._watching.join(self.config.heartbeat_timeout_s)
            self._kill()

    def _kill(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _watch(self) -> None:
        """A worker that dies or hangs between two calls is replaced then, so that the next one need not wait for it.

        One that was just spawned is left alone: the next call waits for it, with a deadline of its own.
        """
        while not self._closing.wait(self.config.heartbeat_s):
            with self._idle:
                beats = {i: w.ready.remote() for i, w in enumerate(self.workers) if i not in self.fresh}
                for i, beat in beats.items():
                    if (why := self._silent(beat)) and not self._closing.is_set():
                        self._replace(i, why)

    def _silent(self, beat: Any) -> str | None:
        """Why a heartbeat has no answer. Not by ``wait_for``: a request to stop is for the thread of the loop."""
        try:
            ray.get(beat, timeout=self.config.heartbeat_timeout_s)
        except GetTimeoutError:
            return f"no answer within {self.config.heartbeat_timeout_s:g} s"
        except RayActorError as error:
            return _death(error)
        return None

    def metrics(self) -> dict[str, float]:
        return {"pool/restarts/reward": float(self.restarts)}

    def _submit(self, i: int, groups: Sequence[Work], share: Sequence[int], noisy: bool) -> list[tuple[int, Any]]:
        """A call for each group: worker ``i`` takes them in this order, so that each has a deadline of its own."""
        return [(g, self.workers[i].score.remote([groups[g]], noisy)) for g in share]

    def _collect(
        self, i: int, calls: list[tuple[int, Any]], groups: Sequence[Work], noisy: bool
    ) -> dict[int, list[Score]]:
        """The scores of worker ``i``'s groups. One without an answer is asked again, first, of a fresh process."""
        scores: dict[int, list[Score]] = {}
        tried: int | None = None
        while calls:
            (g, ref), *others = calls
            found = self._result(i, ref, self.config.timeout_s)
            if not isinstance(found, str):
                scores[g] = found[0]
                calls = others
                continue
            if tried == g:
                scores[g] = [Score(math.nan, math.nan, found)] * len(groups[g][0])
            left = [h for h, _ in calls if h not in scores]
            tried = g
            if left:
                self._await_start(i)
            calls = self._submit(i, groups, left, noisy)
        return scores

    def _result(self, i: int, ref: Any, timeout_s: float) -> list[list[Score]] | str:
        """The scores, or why there are none; then worker ``i`` is a fresh one."""
        try:
            return wait_for(ref, timeout_s)
        except GetTimeoutError:
            why = f"no answer within {timeout_s:g} s"
        except RayActorError as error:
            why = _death(error)
        self._replace(i, why)
        return why

    def _await_start(self, i: int) -> None:
        """Until worker ``i`` runs: starting a process is no part of a scoring call's deadline."""
        for _ in range(START_TRIES):
            if i not in self.fresh:
                return
            try:
                ray.get(self.workers[i].__ray_ready__.remote(), timeout=self.config.start_timeout_s)
                self.fresh.discard(i)
            except GetTimeoutError:
                self._replace(i, why := f"did not start within {self.config.start_timeout_s:g} s")
            except RayActorError as error:
                self._replace(i, why := f"did not start: {one_line(error, 200)}")
        if i in self.fresh:
            raise PoolError("reward", "start", f"{START_TRIES} times, a worker {why}")

    def _replace(self, i: int, why: str) -> None:
        """No budget: a group costs at most two restarts, and its samples are counted as failed."""
        self.note(f"reward worker {i}: {why}; restarting it")
        self.restarts += 1
        ray.kill(self.workers[i])
        self.workers[i] = self._spawn(i)
        self.fresh.add(i)

    def _spawn(self, i: int) -> Any:
        return ray.remote(RewardWorker).options(**self.placement.options("reward", i)).remote(self.config)


def _death(error: RayActorError) -> str:
    return f"the process died: {one_line(error, 200)}"
