"""The policy's and the critic's pool behind the interfaces that the loop uses (``dvpo_service/roles.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
import torch
from torch import Tensor

from actors.cluster.placement import Placement
from actors.cluster.pool import Call
from actors.training.critic import CriticWorker, RankValues
from actors.training.policy import PolicyWorker, RankLogprobs
from actors.training.rank_pool import MetricsJob, RankPool, RanksSave, SharedBatch, in_batch_order
from actors.training.worker import TrainerWorker
from dvpo_service.algo.diagnostics import rollout_kl_metrics, rollout_kl_sums
from dvpo_service.config import Backend, Config
from dvpo_service.runs.storage import StoragePath
from dvpo_service.types import Advantages, Metrics, Rollouts, advantage_metrics

if TYPE_CHECKING:
    from actors.weights.transfer import EngineClient


class TrainerRanks:
    """A pool of trainer ranks: what policy and critic have in common."""

    ranks: RankPool

    def save(self, folder: StoragePath) -> RanksSave:
        """Start a save. A rank does what it is asked in order, so it takes its copy before the next update."""
        return RanksSave(self.ranks, self.ranks.submit(TrainerWorker.save, str(folder)))

    def load(self, folder: StoragePath) -> None:
        """Restore what ``save`` wrote, at any number of ranks."""
        self.ranks.call(TrainerWorker.load, str(folder))


@dataclass
class RanksScoring:
    """Log-probs under way: the loop's ``ScoringJob``."""

    call: Call
    rollouts: Rollouts

    def result(self) -> Rollouts:
        """Wait, and return the rollouts with log-probs, in the batch's order. Raises as ``Call.result`` does."""
        return with_logprobs(self.rollouts, self.call.result())


class PolicyRanks(TrainerRanks):
    """The policy pool as the loop's ``Policy``. ``batch`` is shared with the critic's pool."""

    def __init__(self, config: Config, model_path: str, placement: Placement, batch: SharedBatch):
        self.batch = batch
        self.ranks = RankPool(
            "policy",
            PolicyWorker,
            (config, model_path),
            config.policy.world_size,
            placement,
            timeout_s=config.policy.step_timeout_s,
        )

    def logprobs_async(self, rollouts: Rollouts, step: int) -> RanksScoring:
        """Start to compute log-probs before the update, and under the reference if there is one."""
        shared, _ = self.batch.share(rollouts)
        return RanksScoring(self.ranks.submit(PolicyWorker.logprobs, shared, step), rollouts)

    def score(self, rollouts: Rollouts) -> Tensor:
        """Return the current log-probs [B, T] of a few responses."""
        return self.ranks.call(PolicyWorker.score, ray.put(rollouts))[0]

    def update_async(self, rollouts: Rollouts, advantages: Tensor, step: int) -> MetricsJob:
        """Start the update; ``advantages`` [B, T] as the loss takes them."""
        shared, changes = self.batch.share(rollouts)
        return MetricsJob(self.ranks.submit(PolicyWorker.update, shared, ray.put(changes), ray.put(advantages), step))

    def send_weights(self, client: EngineClient, backend: Backend, timeout_s: float) -> dict[int, str]:
        """Push the current weights to engines; return those lost on the way, with the cause. Raises PoolError."""
        return self.ranks.call(PolicyWorker.send_weights, client, backend, timeout_s=timeout_s)[0]

    def export(self, folder: StoragePath) -> None:
        """Write the policy as a Hugging Face folder."""
        self.ranks.call(PolicyWorker.export, str(folder))


class CriticEstimator(TrainerRanks):
    """The critic pool as the loop's ``Estimator``. ``batch`` is shared with the policy's pool."""

    def __init__(self, config: Config, model_path: str, placement: Placement, batch: SharedBatch):
        self.batch = batch
        self.ranks = RankPool(
            "critic",
            CriticWorker,
            (config, model_path),
            config.critic.world_size,
            placement,
            timeout_s=config.critic.step_timeout_s,
        )

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        """Return scalar advantages and values [B, T], and the critic's metrics on this batch."""
        shared, changes = self.batch.share(rollouts)
        answers = self.ranks.call(CriticWorker.evaluate, shared, ray.put(changes), step)
        return estimated(rollouts, [values for values, _ in answers], answers[0][1])

    def update_async(self, rollouts: Rollouts, step: int) -> MetricsJob:
        """Start the update on the batch whose advantages were computed last."""
        return MetricsJob(self.ranks.submit(CriticWorker.update))

    def distributions(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Return levels [M] and every head's sorted atoms [B, T, H, M] of given responses."""
        return self.ranks.call(CriticWorker.distributions, ray.put(rollouts))[0]

    def export(self, folder: StoragePath) -> None:
        """Write the critic as ``DistributionalCritic.from_pretrained`` loads it."""
        self.ranks.call(CriticWorker.export, str(folder))


def with_logprobs(rollouts: Rollouts, parts: list[RankLogprobs]) -> Rollouts:
    """Return the rollouts with the log-probs that the ranks computed, in the batch's order."""
    rows = torch.cat([p.rows for p in parts])
    scored = rollouts.with_(logprobs=in_batch_order(rows, [p.logprobs for p in parts]))
    reference = [p.ref_logprobs for p in parts if p.ref_logprobs is not None]
    return scored.with_(ref_logprobs=in_batch_order(rows, reference)) if reference else scored


def estimated(rollouts: Rollouts, parts: list[RankValues], metrics: Metrics) -> tuple[Advantages, Metrics]:
    """Return the ranks' advantages and values in the batch's order, and the critic's metrics with those of both."""
    rows = torch.cat([p.rows for p in parts])
    advantages = in_batch_order(rows, [p.advantages for p in parts])
    values = in_batch_order(rows, [p.values for p in parts])
    return Advantages(advantages, values), metrics | advantage_metrics(advantages, rollouts.response_mask)


def engine_mismatch(rollouts: Rollouts) -> Metrics:
    """Return how far the rollout engine's log-probs are from the trainer's, on the sampled tokens."""
    assert rollouts.logprobs is not None
    return rollout_kl_metrics(rollout_kl_sums(rollouts.logprobs, rollouts.rollout_logprobs, rollouts.response_mask))
