"""``adv_estimator: gae`` (PPO's scalar critic) and ``robust_gae`` (its backup made pessimistic)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.advantages import scalar_gae
from dvpo_service.algo.baselines.gae import value_loss
from dvpo_service.algo.baselines.robust_gae import robust_gae
from dvpo_service.config import AlgorithmConfig
from dvpo_service.estimators.objective import Carried, Estimate, bootstrap, critic_lambda, policy_lambda
from dvpo_service.types import Rollouts


class GaeObjective:
    """One head of one atom: the value. ``rho`` > 0 contaminates every backup with the worst value."""

    heads = quantiles = 1
    loss_name = "value_loss"

    def __init__(self, algorithm: AlgorithmConfig, value_clip: float | None):
        self.algorithm, self.value_clip = algorithm, value_clip
        self.rho = algorithm.robust_rho if algorithm.adv_estimator == "robust_gae" else 0.0

    def estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, *, seeds: Tensor, pretraining: bool, carried: Carried
    ) -> Estimate:
        rewards, mask = part.rewards.to(z.device), part.response_mask.to(z.device)
        value, end = z[..., 0, 0], bootstrap(self.algorithm, part, z_end[..., 0, 0])
        ended = part.finished.to(z.device) | (not self.algorithm.bootstrap_truncated)

        def backup(lam: float | Tensor) -> tuple[Tensor, Tensor]:
            gamma = self.algorithm.gamma
            if self.rho == 0:
                return scalar_gae(rewards, value, mask, end, gamma, lam)
            return robust_gae(
                rewards, value, mask, end, gamma, lam, rho=self.rho, worst=carried.worst_value, ended=ended
            )

        advantages, _ = backup(policy_lambda(self.algorithm, mask))
        _, targets = backup(critic_lambda(self.algorithm, pretraining))
        return Estimate(targets.unsqueeze(-1), advantages, torch.where(mask, value, 0.0))

    def loss(
        self, z: Tensor, kept: Estimate, mask: Tensor, *, denominator: float, carried: Carried, gate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values, returns = z[..., 0, 0], kept.targets[..., 0]
        loss, clipped = value_loss(
            values, returns, mask, old_values=kept.values, clip=self.value_clip, denominator=denominator
        )
        return loss, {"value_clip_fraction": clipped.sum() / denominator}

    def gate(self, z: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=z.device)
