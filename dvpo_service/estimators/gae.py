"""``adv_estimator: gae`` (PPO's scalar critic) and ``robust_gae`` (the same with a pessimistic backup)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.advantages import scalar_gae
from dvpo_service.algo.baselines.gae import value_loss
from dvpo_service.algo.baselines.robust_gae import robust_gae
from dvpo_service.config import AlgorithmConfig, CriticConfig
from dvpo_service.estimators.base import (
    CriticObjective,
    Estimate,
    RunningStats,
    bootstrap,
    critic_lambda,
    policy_lambda,
)
from dvpo_service.registry.estimators import ESTIMATORS
from dvpo_service.types import Rollouts


class GaeObjective(CriticObjective):
    """PPO's scalar critic with GAE (arXiv 1506.02438): one head with one atom, which is the value."""

    traits = ESTIMATORS["gae"].traits
    heads = quantiles = 1
    loss_name = "value_loss"

    def __init__(self, algorithm: AlgorithmConfig, critic: CriticConfig):
        self.algorithm = algorithm
        self.value_clip = critic.value_clip

    def estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, *, seeds: Tensor, pretraining: bool, stats: RunningStats
    ) -> Estimate:
        mask = part.response_mask.to(z.device)
        value = z[..., 0, 0]
        end = bootstrap(self.algorithm, part, z_end[..., 0, 0])
        advantages, _ = self._backup(value, end, part, policy_lambda(self.algorithm, mask), stats)
        _, targets = self._backup(value, end, part, critic_lambda(self.algorithm, pretraining), stats)
        return Estimate(targets.unsqueeze(-1), advantages, torch.where(mask, value, 0.0))

    def loss(
        self,
        z: Tensor,
        critic_targets: Estimate,
        mask: Tensor,
        *,
        denominator: float,
        stats: RunningStats,
        batch_mean_shift: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, clipped = value_loss(
            z[..., 0, 0],
            critic_targets.targets[..., 0],
            mask,
            old_values=critic_targets.values,
            clip=self.value_clip,
            denominator=denominator,
        )
        return loss, {"value_clip_fraction": clipped.sum() / denominator}

    def _backup(
        self, value: Tensor, end: Tensor, part: Rollouts, lam: float | Tensor, stats: RunningStats
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and returns, both [b, T]."""
        rewards, mask = part.rewards.to(value.device), part.response_mask.to(value.device)
        return scalar_gae(rewards, value, mask, end, self.algorithm.gamma, lam)


class RobustGaeObjective(GaeObjective):
    """GAE that mixes the worst value into every backup, with weight ``algorithm.robust_rho``."""

    traits = ESTIMATORS["robust_gae"].traits

    def _backup(
        self, value: Tensor, end: Tensor, part: Rollouts, lam: float | Tensor, stats: RunningStats
    ) -> tuple[Tensor, Tensor]:
        rho = self.algorithm.robust_rho
        if rho == 0:
            return super()._backup(value, end, part, lam, stats)
        rewards, mask = part.rewards.to(value.device), part.response_mask.to(value.device)
        ended = part.finished.to(value.device) | (not self.algorithm.bootstrap_truncated)
        return robust_gae(
            rewards, value, mask, end, self.algorithm.gamma, lam, rho=rho, worst=stats.worst_value, ended=ended
        )
