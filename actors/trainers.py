"""The policy and critic pools in the roles that the loop talks to."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from actors.pool import Call, RankPool
from dvpo_service.algo.advantages import whiten, whitening_sums
from dvpo_service.algo.diagnostics import rollout_kl_metrics, rollout_kl_sums
from dvpo_service.algo.policy_loss import kl_penalty
from dvpo_service.config import Config
from dvpo_service.integrity import Files
from dvpo_service.storage import Place
from dvpo_service.types import Advantages, Metrics, Rollouts, advantage_metrics


@dataclass
class MetricsJob:
    """An update under way; its metrics are global sums already, so any rank's will do."""

    call: Call

    def result(self) -> Metrics:
        return self.call.result()[0]


@dataclass
class RanksSave:
    """A ``SaveJob`` of a pool. Asking is a call like any other: the ranks answer between two of them."""

    ranks: RankPool
    started: Call

    def done(self) -> bool:
        self.started.result()
        return all(files is not None for files in self.ranks.call("saved", False))

    def result(self, timeout_s: float | None = None) -> Files:
        self.started.result()
        found: Files = {}
        for files in self.ranks.call("saved", True, timeout_s=timeout_s):
            found |= files
        return found


class PolicyPool:
    """Ranks of ``PolicyWorker``."""

    def __init__(self, config: Config, ranks: RankPool):
        self.config, self.ranks = config, ranks

    def logprobs(self, rollouts: Rollouts, step: int) -> Rollouts:
        """Adds log-probs; with ``kl.where = reward`` the rewards become ``r - coef * KL`` per token."""
        parts = self.ranks.call("logprobs", ray.put(rollouts), step)
        rows = torch.cat([p.rows for p in parts])
        rollouts = rollouts.with_(logprobs=_in_order(rows, [p.logprobs for p in parts]))
        if parts[0].ref_logprobs is None:
            return rollouts
        rollouts = rollouts.with_(ref_logprobs=_in_order(rows, [p.ref_logprobs for p in parts]))
        kl = self.config.policy.kl
        if kl.where == "reward":
            assert rollouts.logprobs is not None
            assert rollouts.ref_logprobs is not None
            penalty = kl_penalty(rollouts.logprobs, rollouts.ref_logprobs, kl.kind)
            rewards = rollouts.rewards - kl.coef * penalty
            rollouts = rollouts.with_(rewards=torch.where(rollouts.response_mask, rewards, 0.0))
        return rollouts

    def update_async(self, rollouts: Rollouts, advantages: Advantages, step: int) -> MetricsJob:
        values, mask = advantages.advantages, rollouts.response_mask
        if self.config.algorithm.whiten_advantages:
            values = whiten(values, mask, whitening_sums(values, mask)).float()
        return MetricsJob(self.ranks.submit("update", ray.put(rollouts), ray.put(values), step))

    def save(self, folder: Place) -> RanksSave:
        """Not waited for: a rank does what it is asked in order, so it takes its copy before the next update."""
        return RanksSave(self.ranks, self.ranks.submit("save", str(folder)))

    def load(self, folder: Place) -> None:
        self.ranks.call("load", str(folder))

    def export(self, folder: Place) -> None:
        self.ranks.call("export", str(folder))


class CriticEstimator:
    """Ranks of ``CriticWorker``: distributional GAE where the values are, scalars out."""

    def __init__(self, config: Config, ranks: RankPool):
        self.config, self.ranks = config, ranks

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        found = self.ranks.call("evaluate", ray.put(rollouts), step)
        parts, metrics = [f[0] for f in found], found[0][1]
        rows = torch.cat([p.rows for p in parts])
        advantages = Advantages(
            _in_order(rows, [p.advantages for p in parts]), _in_order(rows, [p.values for p in parts])
        )
        return advantages, metrics | advantage_metrics(advantages.advantages, rollouts.response_mask)

    def update_async(self, rollouts: Rollouts, step: int) -> MetricsJob:
        return MetricsJob(self.ranks.submit("update"))

    def distributions(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Levels [M] and every head's sorted atoms [B, T, H, M] of given responses."""
        return self.ranks.call("distributions", ray.put(rollouts))[0]

    def save(self, folder: Place) -> RanksSave:
        """Not waited for: a rank does what it is asked in order, so it takes its copy before the next update."""
        return RanksSave(self.ranks, self.ranks.submit("save", str(folder)))

    def load(self, folder: Place) -> None:
        self.ranks.call("load", str(folder))

    def export(self, folder: Place) -> None:
        self.ranks.call("export", str(folder))


def engine_mismatch(rollouts: Rollouts) -> Metrics:
    """How far the rollout engine's log-probs are from the trainer's, on the sampled tokens."""
    assert rollouts.logprobs is not None
    return rollout_kl_metrics(rollout_kl_sums(rollouts.logprobs, rollouts.rollout_logprobs, rollouts.response_mask))


def _in_order(rows: Tensor, parts: list[Tensor]) -> Tensor:
    """Undo the cut: ``parts`` concatenated are the batch's rows ``rows``."""
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, rows, joined)
