"""The pool of reward workers: every scoring call has a deadline, and a failed call costs only its own samples."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.cluster.placement import Placement
from actors.cluster.pool import PoolError, wait_for
from actors.rollouts.reward import RewardModelWorker, RewardWorker, Work
from dvpo_service.config import RewardConfig, RewardPart
from dvpo_service.errors import one_line
from dvpo_service.rewards.combine import combine
from dvpo_service.rewards.scoring import Result
from dvpo_service.types import Score

log = logging.getLogger(__name__)

START_TRIES = 3
# An async function stops at the deadline itself, response by response; then its process need not be replaced.
GRACE_S = 1.0


class Job(NamedTuple):
    """One call of a worker: reward number ``part`` for the groups of these numbers."""

    part: int
    groups: tuple[int, ...]


class RewardPool:
    """Actors that score, one reward per call, and one group unless the reward takes many at once.

    Functions and judges share the workers of ``reward.num_workers``; every reward model has workers of its own.

    A call that misses its deadline or kills its process is tried once more, in a fresh process. If it fails again, its
    samples are marked as failed, with no score (never 0). A thread also checks idle workers and replaces lost ones.

    Args:
      note: gets one line for every worker that is replaced.
    """

    def __init__(self, config: RewardConfig, placement: Placement, note: Callable[[str], None] = log.warning):
        self.config, self.placement, self.note = config, placement, note
        self.restarts = 0
        self.crew = config.crew
        self.workers = [self._spawn(i) for i in range(len(self.crew))]
        self.fresh = set(range(len(self.crew)))  # spawned, but not known to run yet
        self._idle = threading.Lock()  # held while the workers are called
        self._closing = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="reward watch", daemon=True)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every worker has loaded the reward function, then begin to watch idle workers.

        Raises:
          PoolError: a worker cannot load the function on its node, or did not answer within ``timeout_s``.
        """
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
        """Return a list of scores for every group, in the order of ``groups``.

        Args:
          groups: what to score.
          noisy: whether it is for training; see ``combine``.

        Raises:
          PoolError: a worker cannot be started.
        """
        with self._idle:
            for i in list(self.fresh):
                self._await_start(i)
            calls = {i: self._submit(i, groups, share) for i, share in self._shares(groups).items()}
            results: list[dict[int, list[Result]]] = [{} for _ in groups]
            for i in calls:
                for job, found in self._collect(i, calls[i], groups).items():
                    for g, of_group in zip(job.groups, found, strict=True):
                        results[g][job.part] = of_group
        return combine(self.config, groups, results, training=noisy)

    def shutdown(self) -> None:
        """End the watch and every worker."""
        self._closing.set()
        self._kill()  # also ends a heartbeat call that waits
        if self._watching.is_alive():
            self._watching.join(self.config.heartbeat_timeout_s)
            self._kill()

    def _kill(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _watch(self) -> None:
        """Replace workers that die or hang between two scoring calls, so that the next call need not wait for it.

        A worker that was just spawned is left alone: the next scoring call waits for it, with a deadline of its own.
        """
        while not self._closing.wait(self.config.heartbeat_s):
            with self._idle:
                beats = {i: w.ready.remote() for i, w in enumerate(self.workers) if i not in self.fresh}
                for i, beat in beats.items():
                    why = self._heartbeat_failure(beat)
                    if why and not self._closing.is_set():
                        self._replace(i, why)

    def _heartbeat_failure(self, beat: Any) -> str | None:
        """Return why a heartbeat failed, or None.

        It does not use ``wait_for``, because a request to stop is for the loop's thread.
        """
        try:
            ray.get(beat, timeout=self.config.heartbeat_timeout_s)
        except GetTimeoutError:
            return f"no answer within {self.config.heartbeat_timeout_s:g} s"
        except RayActorError as error:
            return _death(error)
        return None

    def metrics(self) -> dict[str, float]:
        """Return the number of workers replaced so far."""
        return {"pool/restarts/reward": float(self.restarts)}

    def _shares(self, groups: Sequence[Work]) -> dict[int, list[Job]]:
        """Return the calls of every worker: those that can do a call take turns."""
        shares: dict[int, list[Job]] = {i: [] for i in range(len(self.workers))}
        turns: Counter[int | None] = Counter()
        for k, part in enumerate(self.config.parts):
            kind = k if part.model else None
            able = [i for i, serves in enumerate(self.crew) if serves == kind]
            its = [g for g, work in enumerate(groups) if part.scores(work.source)]
            size = max(1, math.ceil(len(its) / len(able))) if part.batched else 1
            for start in range(0, len(its), size):
                shares[able[turns[kind] % len(able)]].append(Job(k, tuple(its[start : start + size])))
                turns[kind] += 1
        return shares

    def _submit(self, i: int, groups: Sequence[Work], share: Sequence[Job]) -> list[tuple[Job, Any]]:
        """Start one call per job of ``share`` on worker ``i``, in order: each call then has its own deadline."""
        return [(job, self.workers[i].score.remote(job.part, [groups[g] for g in job.groups])) for job in share]

    def _collect(self, i: int, calls: list[tuple[Job, Any]], groups: Sequence[Work]) -> dict[Job, list[list[Result]]]:
        """Return the results of worker ``i``'s jobs. After a failed call a fresh worker takes its job first."""
        results: dict[Job, list[list[Result]]] = {}
        tried: Job | None = None
        while calls:
            (job, ref), *others = calls
            result = self._result(i, ref, self._timeout_s(job, groups))
            if not isinstance(result, str):
                results[job] = result
                calls = others
                continue
            if tried == job:
                results[job] = [[Result(math.nan, error=result)] * len(groups[g].responses) for g in job.groups]
            left = [other for other, _ in calls if other not in results]
            tried = job
            if left:
                self._await_start(i)
            calls = self._submit(i, groups, left)
        return results

    def _timeout_s(self, job: Job, groups: Sequence[Work]) -> float:
        return self.config.timeout_of(self.config.parts[job.part], len(groups[job.groups[0]].responses))

    def _result(self, i: int, ref: Any, timeout_s: float) -> list[list[Result]] | str:
        """Return the results, or replace worker ``i`` and return why there are none."""
        try:
            return wait_for(ref, timeout_s + GRACE_S)
        except GetTimeoutError:
            why = f"no answer within {timeout_s:g} s"
        except RayActorError as error:
            why = _death(error)
        self._replace(i, why)
        return why

    def _await_start(self, i: int) -> None:
        """Wait until worker ``i`` runs, so that a process's start does not count against a scoring call's deadline."""
        for _ in range(START_TRIES):
            if i not in self.fresh:
                return
            try:
                ray.get(self.workers[i].__ray_ready__.remote(), timeout=self.config.start_timeout_s)
                self.fresh.discard(i)
            except GetTimeoutError:
                why = f"did not start within {self.config.start_timeout_s:g} s"
                self._replace(i, why)
            except RayActorError as error:
                why = f"did not start: {one_line(error, 200)}"
                self._replace(i, why)
        if i in self.fresh:
            raise PoolError("reward", "start", f"{START_TRIES} times, a worker {why}")

    def _replace(self, i: int, why: str) -> None:
        """Kill worker ``i`` and spawn another. It needs no budget: a group costs two restarts at most, then fails."""
        self.note(f"reward worker {i}: {why}; restarting it")
        self.restarts += 1
        ray.kill(self.workers[i])
        self.workers[i] = self._spawn(i)
        self.fresh.add(i)

    def _spawn(self, i: int) -> Any:
        part = self.crew[i]
        if part is None:
            return ray.remote(RewardWorker).options(**self.placement.options("reward", i)).remote(self.config)
        number = i - self.crew.count(None)
        options = self.placement.options("reward_model", number)
        return ray.remote(RewardModelWorker).options(**options).remote(_with_whole_paths(self.config), part)


def _with_whole_paths(config: RewardConfig) -> RewardConfig:
    """Return the config with the absolute paths of reward models: actors have other working directories."""

    def whole(part: RewardPart) -> RewardPart:
        if part.model is None or not Path(part.model.path).exists():
            return part
        model = part.model.model_copy(update={"path": str(Path(part.model.path).absolute())})
        return part.model_copy(update={"model": model})

    return config.model_copy(update={"rewards": [whole(part) for part in config.parts]})


def _death(error: RayActorError) -> str:
    return f"the process died: {one_line(error, 200)}"
