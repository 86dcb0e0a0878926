"""What an advantage estimator is: a critic's objective, or a comparison of samples. Plain torch, one rank's view."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from dvpo_service.algo.advantages import length_adaptive_lambda
from dvpo_service.config import AlgorithmConfig, CriticConfig
from dvpo_service.models.critic_folder import CriticSpec
from dvpo_service.registry import estimators
from dvpo_service.registry.estimators import EstimatorTraits
from dvpo_service.types import Rollouts

T = TypeVar("T", bound=Callable[..., Any])


def estimator(**traits: bool) -> Callable[[T], T]:
    """Return a decorator that declares the properties of an estimator, as ``EstimatorTraits`` lists them.

    ::

        @estimator(needs_groups=True)
        def best_of_group(rollouts, algorithm): ...
    """
    declared = EstimatorTraits(**traits)

    def declare(target: T) -> T:
        target.traits = declared  # type: ignore[attr-defined]
        return target

    return declare


class GroupAdvantage(Protocol):
    """An estimator without a critic: a function of a whole batch, called in the driver."""

    traits: EstimatorTraits

    def __call__(self, rollouts: Rollouts, algorithm: AlgorithmConfig) -> Tensor:
        """Return the advantages [B, T] float, 0 where ``rollouts.response_mask`` is False."""


@dataclass(frozen=True)
class Estimate:
    """What a critic makes of b sequences before its update; all detached, 0 where masked."""

    targets: Tensor  # [b, T, K], K = M atoms or 1
    advantages: Tensor  # [b, T], not whitened
    values: Tensor  # [b, T]

    def to(self, device: torch.device) -> Estimate:
        """Return the same on ``device``."""
        return Estimate(self.targets.to(device), self.advantages.to(device), self.values.to(device))


@dataclass(frozen=True)
class RunningStats:
    """What a critic remembers of earlier batches; equal on every rank."""

    return_sd: float  # of all returns so far
    worst_value: float  # the least value in the batch before this one


class CriticObjective(ABC):
    """What a critic is trained for: its targets, the advantages it gives, its loss.

    A class of its own derives from this one or from a built-in, and is made with the two config sections. ``z``
    [b, T, H, M] are the atoms as the critic gives them, ``z_end`` [b, H, M] those after the last token.
    """

    traits: ClassVar[EstimatorTraits]
    heads: int
    quantiles: int
    loss_name: str  # the loss is reported as ``critic/<loss_name>``

    @abstractmethod
    def __init__(self, algorithm: AlgorithmConfig, critic: CriticConfig) -> None: ...

    @abstractmethod
    def estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, *, seeds: Tensor, pretraining: bool, stats: RunningStats
    ) -> Estimate:
        """Return targets, advantages and values of the sequences in ``part``.

        Args:
          seeds: [b] int64, one a sequence, for whatever is random.
          pretraining: the policy does not move yet, so the targets are plain returns (lambda 1): with nothing
            learned there is nothing to bootstrap from.
        """

    @abstractmethod
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
        """Return the scalar loss with its gradient, and measurements that add up over micro-batches and ranks.

        Args:
          critic_targets: what ``estimate`` made of the same sequences.
          denominator: valid tokens of the optimizer step, over all micro-batches and ranks.
          batch_mean_shift: the sum of ``shift_sum`` over the optimizer step / ``denominator``.
        """

    def shift_sum(self, z: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the sum over tokens (float64 scalar) of which ``loss`` needs the global mean, or 0."""
        return torch.zeros((), dtype=torch.float64, device=z.device)


def critic_objective(algorithm: AlgorithmConfig, critic: CriticConfig) -> CriticObjective:
    """Return the objective that ``algorithm.adv_estimator`` names."""
    return estimators.load(algorithm.adv_estimator)(algorithm, critic)


def critic_spec(algorithm: AlgorithmConfig, objective: CriticObjective) -> CriticSpec:
    """Return what the critic of this objective predicts, for those who load it later."""
    return CriticSpec(
        width=algorithm.critic_hidden_dim,
        num_heads=objective.heads,
        num_quantiles=objective.quantiles,
        quantile_levels=algorithm.quantile_levels if algorithm.traits.distributional else "midpoint",
        alpha=algorithm.dvpo_alpha,
        beta=algorithm.dvpo_beta,
        estimator=algorithm.adv_estimator,
    )


def policy_lambda(algorithm: AlgorithmConfig, mask: Tensor) -> float | Tensor:
    """Return GAE's lambda for the advantages: ``lam``, or one by length [b, 1] (VAPO, arXiv 2504.05118)."""
    if algorithm.length_adaptive_alpha is None:
        return algorithm.lam
    return length_adaptive_lambda(mask, algorithm.length_adaptive_alpha)


def critic_lambda(algorithm: AlgorithmConfig, pretraining: bool) -> float:
    """Return GAE's lambda for the targets (decoupled from the policy's: VC-PPO, arXiv 2503.01491)."""
    if pretraining:
        return 1.0
    return algorithm.lam if algorithm.critic_lam is None else algorithm.critic_lam


def bootstrap(algorithm: AlgorithmConfig, part: Rollouts, end: Tensor) -> Tensor:
    """Return the values after the last token [b, ...]: the critic's own where a response was cut, else 0."""
    if not algorithm.bootstrap_truncated:
        return torch.zeros_like(end)
    cut = ~part.finished.to(end.device)
    return torch.where(cut.reshape(-1, *(1 for _ in range(end.dim() - 1))), end, torch.zeros_like(end))
