"""Dispatch of scoring calls: each has a deadline, and a bad one costs its own samples only."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.placement import Placement
from actors.pool import PoolError, wait_for
from actors.reward import RewardWorker, Work
from dvpo_service.config import RewardConfig
from dvpo_service.types import Score

log = logging.getLogger(__name__)


class RewardPool:
    """CPU actors that score. A call that misses its deadline or kills its process is tried once more,
    group by group, in a fresh process; what fails again is marked failed, never 0."""

    def __init__(self, config: RewardConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.workers = [self._spawn(i) for i in range(config.num_workers)]

    def wait_ready(self, timeout_s: float) -> None:
        """Raise PoolError when a worker cannot load the reward function on its node."""
        try:
            ray.get([w.ready.remote() for w in self.workers], timeout=timeout_s)
        except GetTimeoutError as error:
            raise PoolError("reward", "start", f"no answer within {timeout_s:g} s") from error
        except RayActorError as error:
            why = str(error).strip().splitlines()[-1]
            raise PoolError(
                "reward", "start", f"{why} On a cluster, submit the job with --working-dir, so that your module travels"
            ) from error

    def score(self, groups: Sequence[Work], *, noisy: bool) -> list[list[Score]]:
        """One list of scores per group, in order."""
        shares = [list(range(i, len(groups), len(self.workers))) for i in range(len(self.workers))]
        calls = [
            (i, share, self.workers[i].score.remote([groups[g] for g in share], noisy))
            for i, share in enumerate(shares)
            if share
        ]
        scores: dict[int, list[Score]] = {}
        for i, share, ref in calls:
            # Every group of the share may take the whole deadline in turn.
            found = self._result(i, ref, self.config.timeout_s * len(share))
            if isinstance(found, str):
                found = [self._retry(i, groups[g], noisy) for g in share]
            scores.update(zip(share, found, strict=True))
        return [scores[g] for g in range(len(groups))]

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def _retry(self, i: int, group: Work, noisy: bool) -> list[Score]:
        found = self._result(i, self.workers[i].score.remote([group], noisy), self.config.timeout_s)
        if isinstance(found, str):
            return [Score(math.nan, math.nan, found)] * len(group[0])
        return found[0]

    def _result(self, i: int, ref: Any, timeout_s: float) -> list[list[Score]] | str:
        """The scores, or why there are none; then worker ``i`` is a fresh one."""
        try:
            return wait_for(ref, timeout_s)
        except GetTimeoutError:
            why = f"no answer within {timeout_s:g} s"
        except RayActorError as error:
            why = f"the process died: {' '.join(str(error).split())[:200]}"
        log.warning("reward worker %d: %s; restarting it", i, why)
        ray.kill(self.workers[i])
        self.workers[i] = self._spawn(i)
        return why

    def _spawn(self, i: int) -> Any:
        return ray.remote(RewardWorker).options(**self.placement.options("reward", i)).remote(self.config)
