"""The loop's roles in this process: the workers of the pools, called directly and one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from actors.training.roles import estimated, with_logprobs
from actors.training.worker import TrainerWorker
from dvpo_service.config import RewardConfig
from dvpo_service.errors import CheckpointError
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.combine import combine
from dvpo_service.rewards.parts import load_part
from dvpo_service.rewards.scoring import Result
from dvpo_service.runs.integrity import Files
from dvpo_service.runs.storage import StoragePath
from dvpo_service.types import Advantages, Metrics, Rollouts, Score

T = TypeVar("T")
POLL_S = 0.05


@dataclass(frozen=True)
class Done(Generic[T]):
    """A ``Job`` or ``ScoringJob`` whose work was done when it was asked for."""

    value: T

    def result(self) -> T:
        return self.value


@dataclass(frozen=True)
class WorkerSave:
    """A ``SaveJob`` of one worker, which writes its files in a thread."""

    worker: TrainerWorker

    def done(self) -> bool:
        return self.worker.saved(False) is not None

    def result(self, timeout_s: float | None = None) -> Files:
        """Wait until everything is written. Raises CheckpointError after ``timeout_s``, by default a step's limit."""
        limit_s = timeout_s or self.worker.config.policy.step_timeout_s
        deadline = time.monotonic() + limit_s
        while (files := self.worker.saved(False)) is None:
            if time.monotonic() > deadline:
                raise CheckpointError(f"a checkpoint was not written within {limit_s:g} s; look at the disk")
            time.sleep(POLL_S)
        return files


class _InProcess:
    """What policy and critic have in common."""

    worker: TrainerWorker

    def save(self, folder: StoragePath) -> WorkerSave:
        """Start a save of the state as it is now."""
        self.worker.save(str(folder))
        return WorkerSave(self.worker)

    def load(self, folder: StoragePath) -> None:
        """Restore what ``save`` wrote, here or by any number of ranks."""
        self.worker.load(str(folder))


class InProcessPolicy(_InProcess):
    """A policy worker as the loop's ``Policy``."""

    worker: PolicyWorker

    def __init__(self, worker: PolicyWorker):
        self.worker = worker

    def logprobs_async(self, rollouts: Rollouts, step: int) -> Done[Rollouts]:
        """Compute log-probs before the update, and under the reference if there is one."""
        return Done(with_logprobs(rollouts, [self.worker.logprobs(rollouts, step)]))

    def update_async(self, rollouts: Rollouts, advantages: Tensor, step: int) -> Done[Metrics]:
        """Update; ``advantages`` [B, T] as the loss takes them."""
        return Done(self.worker.update(rollouts, {}, advantages, step))

    def export(self, folder: StoragePath) -> None:
        """Write the policy as a Hugging Face folder."""
        self.worker.export(str(folder))


class InProcessCritic(_InProcess):
    """A critic worker as the loop's ``Estimator``."""

    worker: CriticWorker

    def __init__(self, worker: CriticWorker):
        self.worker = worker

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        """Return scalar advantages and values [B, T], and the critic's metrics on this batch."""
        values, metrics = self.worker.evaluate(rollouts, {}, step)
        return estimated(rollouts, [values], metrics)

    def update_async(self, rollouts: Rollouts, step: int) -> Done[Metrics]:
        """Update on the batch whose advantages were computed last."""
        return Done(self.worker.update())

    def distributions(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return levels [M] and every head's sorted atoms [B, T, H, M] of given responses."""
        return self.worker.distributions(rollouts)

    def export(self, folder: StoragePath) -> None:
        """Write the critic as ``DistributionalCritic.from_pretrained`` loads it."""
        self.worker.export(str(folder))


class InProcessRewards:
    """The config's rewards, scored here as a reward pool scores them.

    There is no process to end, so ``reward.timeout_s`` bounds only what bounds itself: async functions, judges and
    programs in the sandbox.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        self.parts = [load_part(config, part) for part in config.parts]

    def score(self, groups: Sequence[Work], *, noisy: bool) -> list[list[Score]]:
        """Return a list of scores for every group; ``noisy`` as for ``RewardPool.score``."""
        results: list[dict[int, list[Result]]] = [{} for _ in groups]
        for k, (part, loaded) in enumerate(zip(self.config.parts, self.parts, strict=True)):
            its = [g for g, work in enumerate(groups) if part.scores(work.source)]
            for g, of_group in zip(its, loaded.score([groups[g] for g in its]), strict=True):
                results[g][k] = of_group
        return combine(self.config, groups, results, training=noisy)
