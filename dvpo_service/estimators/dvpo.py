"""``adv_estimator: dvpo``: the distributional critic (arXiv 2512.03847)."""

from __future__ import annotations

import torch
from torch import Tensor

from dvpo_service.algo.advantages import distributional_gae, mixture_targets, scalar_gae
from dvpo_service.algo.critic_loss import critic_loss, shift_sum
from dvpo_service.algo.huber_advantage import huber_advantages
from dvpo_service.algo.quantiles import ascending
from dvpo_service.algo.risk_advantage import cvar_advantages, entropic_advantages, head_trust
from dvpo_service.config import AlgorithmConfig, CriticConfig
from dvpo_service.estimators.base import (
    CriticObjective,
    Estimate,
    RunningStats,
    bootstrap,
    critic_lambda,
    policy_lambda,
)
from dvpo_service.estimators.critic_terms import load_terms
from dvpo_service.registry.estimators import ESTIMATORS
from dvpo_service.types import Rollouts


class DvpoObjective(CriticObjective):
    """DVPO: targets of M atoms, the eight loss terms and the user's own, an advantage that may be risk-sensitive."""

    traits = ESTIMATORS["dvpo"].traits
    loss_name = "dvpo_loss"

    def __init__(self, algorithm: AlgorithmConfig, critic: CriticConfig):
        self.algorithm = algorithm
        self.spec = algorithm.critic_loss_spec()
        self.own_terms = load_terms(algorithm.critic_terms)
        self.heads = algorithm.n_heads
        self.quantiles = algorithm.n_quantiles

    def estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, *, seeds: Tensor, pretraining: bool, stats: RunningStats
    ) -> Estimate:
        rewards, mask = part.rewards.to(z.device), part.response_mask.to(z.device)
        heads = ascending(z)
        atoms = heads.mean(-2)
        end = bootstrap(self.algorithm, part, ascending(z_end).mean(-2))
        lam, policy_lam = critic_lambda(self.algorithm, pretraining), policy_lambda(self.algorithm, mask)
        targets = self._targets(rewards, atoms, mask, end, lam, seeds)
        value = atoms.mean(-1)
        if self.algorithm.advantage_is_mean:  # like any fixed weighting of atoms: scalar GAE with another baseline
            advantages, _ = scalar_gae(rewards, value, mask, end.mean(-1), self.algorithm.gamma, policy_lam)
        else:
            same = isinstance(policy_lam, float) and policy_lam == lam
            aim = targets if same else self._targets(rewards, atoms, mask, end, policy_lam, seeds)
            advantages = self._compare(atoms, aim, mask, stats)
        if self.algorithm.head_trust:
            advantages = head_trust(advantages, heads, mask, self.algorithm.head_trust)
        return Estimate(targets, advantages, torch.where(mask, value, 0.0))

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
        delta = self._delta(stats)
        loss = critic_loss(
            z,
            critic_targets.targets,
            mask,
            self.spec,
            delta=delta,
            width=stats.return_width,
            denominator=denominator,
            mean_shift=batch_mean_shift,
            own_terms=self.own_terms,
        )
        parts = {f"loss/{t}": v for t, v in loss.raw.items()} | {f"weighted/{t}": v for t, v in loss.weighted.items()}
        # Each part reports its share, so that the parts of the batch add up to delta itself.
        parts["huber_delta"] = delta * mask.sum() / denominator
        return loss.total, parts

    def shift_sum(self, z: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the sum for Eq. 7 where its relu is around the mean over all tokens of all ranks, else 0."""
        if self.spec.shift_over == "token":
            return super().shift_sum(z, targets, mask)
        return shift_sum(z, targets, mask, self.spec)

    def _targets(
        self, rewards: Tensor, atoms: Tensor, mask: Tensor, end: Tensor, lam: float | Tensor, seeds: Tensor
    ) -> Tensor:
        gamma = self.algorithm.gamma
        if self.algorithm.critic_target == "gae":
            return distributional_gae(rewards, atoms, mask, end, gamma, lam)
        return mixture_targets(rewards, atoms, mask, end, gamma, lam, seeds)

    def _compare(self, atoms: Tensor, targets: Tensor, mask: Tensor, stats: RunningStats) -> Tensor:
        """Return the advantages [b, T] of the targets' distribution over the predicted one."""
        a = self.algorithm
        if a.advantage == "cvar":
            return cvar_advantages(atoms, targets, mask, a.advantage_alpha)
        if a.advantage == "entropic":
            return entropic_advantages(atoms, targets, mask, a.advantage_beta)
        unit = 1.0 if a.advantage_clip_scale == "absolute" else stats.return_width
        return huber_advantages(atoms, targets, mask, a.advantage_clip * unit)

    def _delta(self, stats: RunningStats) -> float:
        """Return the Huber threshold in the units of the returns."""
        units = {"absolute": 1.0, "return_sd": stats.return_sd or 1.0, "return_width": stats.return_width}
        return self.algorithm.huber_delta * units[self.algorithm.huber_scale]
