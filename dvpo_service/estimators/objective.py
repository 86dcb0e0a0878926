"""What a critic is trained for: its targets, the advantages it gives, its loss. Plain torch, one rank's view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dvpo_service.algo.advantages import length_adaptive_lambda
from dvpo_service.config import AlgorithmConfig
from dvpo_service.models.critic_folder import CriticSpec
from dvpo_service.types import Rollouts


@dataclass(frozen=True)
class Estimate:
    """What a critic makes of b sequences before its update; all detached, 0 where masked."""

    targets: Tensor  # [b, T, K], K = M atoms or 1
    advantages: Tensor  # [b, T], not whitened
    values: Tensor  # [b, T]

    def to(self, device: torch.device) -> Estimate:
        return Estimate(self.targets.to(device), self.advantages.to(device), self.values.to(device))


@dataclass(frozen=True)
class Carried:
    """What a critic remembers from earlier batches, the same on every rank."""

    return_sd: float  # of all returns so far
    worst_value: float  # the least value in the batch before this one


class CriticObjective(Protocol):
    """``z`` [b, T, H, M] atoms as the critic gives them, ``z_end`` [b, H, M] those after the last token."""

    heads: int
    quantiles: int
    loss_name: str

    def estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, *, seeds: Tensor, pretraining: bool, carried: Carried
    ) -> Estimate:
        """``seeds`` [b] int64, one a sequence. ``pretraining``: the policy does not move yet, so the targets
        are plain returns (lambda 1): with nothing learned there is nothing to bootstrap from."""

    def loss(
        self, z: Tensor, kept: Estimate, mask: Tensor, *, denominator: float, carried: Carried, gate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its gradient, and measurements that add up over micro-batches and ranks."""

    def gate(self, z: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """A sum over tokens whose global mean opens a term of ``loss``; 0 where nothing needs it."""


def critic_objective(algorithm: AlgorithmConfig, value_clip: float | None) -> CriticObjective:
    """The objective that ``algorithm.adv_estimator`` names."""
    from dvpo_service.estimators.dvpo import DvpoObjective
    from dvpo_service.estimators.gae import GaeObjective

    if algorithm.adv_estimator == "dvpo":
        return DvpoObjective(algorithm)
    return GaeObjective(algorithm, value_clip)


def critic_spec(algorithm: AlgorithmConfig, objective: CriticObjective) -> CriticSpec:
    """What the critic of this objective predicts, for those who load it later."""
    return CriticSpec(
        width=algorithm.critic_hidden_dim,
        num_heads=objective.heads,
        num_quantiles=objective.quantiles,
        quantile_levels=algorithm.quantile_levels if algorithm.adv_estimator == "dvpo" else "midpoint",
        alpha=algorithm.dvpo_alpha,
        beta=algorithm.dvpo_beta,
        estimator=algorithm.adv_estimator,
    )


def policy_lambda(algorithm: AlgorithmConfig, mask: Tensor) -> float | Tensor:
    """GAE's trace for the advantages: ``lam``, or by length (VAPO, arXiv 2504.05118)."""
    if algorithm.length_adaptive_alpha is None:
        return algorithm.lam
    return length_adaptive_lambda(mask, algorithm.length_adaptive_alpha)


def critic_lambda(algorithm: AlgorithmConfig, pretraining: bool) -> float:
    """GAE's trace for the targets (decoupled from the policy's: VC-PPO, arXiv 2503.01491)."""
    if pretraining:
        return 1.0
    return algorithm.lam if algorithm.critic_lam is None else algorithm.critic_lam


def bootstrap(algorithm: AlgorithmConfig, part: Rollouts, end: Tensor) -> Tensor:
    """Values after the last token [b, ...]: the critic's own where a response was cut, 0 where it finished."""
    if not algorithm.bootstrap_truncated:
        return torch.zeros_like(end)
    cut = ~part.finished.to(end.device)
    return torch.where(cut.reshape(-1, *(1 for _ in range(end.dim() - 1))), end, torch.zeros_like(end))
