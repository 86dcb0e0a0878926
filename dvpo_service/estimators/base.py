"""The two kinds of advantage estimator: a critic's objective, and a function of the rollouts.

This is plain torch: the code sees the data of one rank only.
"""

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
    """Return a decorator that declares an estimator's properties; ``traits`` are the fields of ``EstimatorTraits``.

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
    """An estimator without a critic: a function of a whole batch, which the driver calls."""

    traits: EstimatorTraits

    def __call__(self, rollouts: Rollouts, algorithm: AlgorithmConfig) -> Tensor:
        """Return the advantages [B, T] float, 0 where ``rollouts.response_mask`` is False."""


@dataclass(frozen=True)
class Estimate:
    """What a critic computes for b sequences before its update. All tensors are detached and 0 where masked."""

    targets: Tensor  # [b, T, K], K = M atoms or 1
    advantages: Tensor  # [b, T], not whitened
    values: Tensor  # [b, T]

    def to(self, device: torch.device) -> Estimate:
        """Return a copy with all tensors on ``device``."""
        return Estimate(self.targets.to(device), self.advantages.to(device), self.values.to(device))


@dataclass(frozen=True)
class RunningStats:
    """Statistics of earlier batches that a critic keeps; equal on every rank."""

    return_sd: float  # standard deviation of all returns so far
    return_width: float  # their robust width (algo/robust_width.py), in units of a normal distribution's sd
    worst_value: float  # the smallest value in the batch before this one


class CriticObjective(ABC):
    """What a critic is trained for: it defines the critic's targets, its advantages and its loss.

    A user's own objective derives from this class or from a built-in one. It is constructed with the config sections
    ``algorithm`` and ``critic``. In all methods ``z`` [b, T, H, M] are the atoms that the critic outputs, unsorted, and
    ``z_end`` [b, H, M] are the atoms after the last token.

    Attributes:
      traits: the estimator's properties.
      heads, quantiles: H and M, the shape of the critic's output.
      loss_name: the loss is reported as ``critic/<loss_name>``.
    """

    traits: ClassVar[EstimatorTraits]
    heads: int
    quantiles: int
    loss_name: str

    @abstractmethod
    def __init__(self, algorithm: AlgorithmConfig, critic: CriticConfig) -> None: ...

    @abstractmethod
    def estimate(
        self, z: Tensor, z_end: Tensor, part: Rollouts, *, seeds: Tensor, pretraining: bool, stats: RunningStats
    ) -> Estimate:
        """Return targets, advantages and values of the sequences in ``part``.

        Args:
          seeds: [b] int64, one per sequence, for anything random in the estimate.
          pretraining: whether only the critic is trained yet. The targets are then plain returns (lambda 1), because an
            untrained critic has no values worth bootstrapping from.
          stats: statistics of earlier batches.
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
          z: the atoms now, with their gradient.
          critic_targets: what ``estimate`` returned for the same sequences.
          mask: [b, T] bool.
          denominator: valid tokens of the optimizer step, over all micro-batches and ranks.
          batch_mean_shift: the sum of ``shift_sum`` over the optimizer step / ``denominator``.
        """

    def shift_sum(self, z: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Return the sum over valid tokens whose global mean ``loss`` needs, a float64 scalar; 0 if it needs none."""
        return torch.zeros((), dtype=torch.float64, device=z.device)


def critic_objective(algorithm: AlgorithmConfig, critic: CriticConfig) -> CriticObjective:
    """Return the objective that ``algorithm.adv_estimator`` names. Raises ConfigError when it cannot be loaded."""
    return estimators.load(algorithm.adv_estimator)(algorithm, critic)


def critic_spec(algorithm: AlgorithmConfig, objective: CriticObjective) -> CriticSpec:
    """Return the description that is saved with the critic of this objective, for code that loads the critic later."""
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
    """Return GAE's lambda for the advantages: the number ``lam``, or a lambda [b, 1] for each response's length.

    The latter is VAPO's (arXiv 2504.05118) and is used when ``algorithm.length_adaptive_alpha`` is set.
    """
    if algorithm.length_adaptive_alpha is None:
        return algorithm.lam
    return length_adaptive_lambda(mask, algorithm.length_adaptive_alpha)


def critic_lambda(algorithm: AlgorithmConfig, pretraining: bool) -> float:
    """Return GAE's lambda for the critic's targets, which may differ from the policy's (VC-PPO, arXiv 2503.01491)."""
    if pretraining:
        return 1.0
    return algorithm.lam if algorithm.critic_lam is None else algorithm.critic_lam


def bootstrap(algorithm: AlgorithmConfig, part: Rollouts, end: Tensor) -> Tensor:
    """Return the values after the last token, [b, ...] like ``end``.

    They are the critic's own values ``end`` where a response was cut at the length limit and
    ``algorithm.bootstrap_truncated`` is true, else 0.
    """
    if not algorithm.bootstrap_truncated:
        return torch.zeros_like(end)
    cut = ~part.finished.to(end.device)
    return torch.where(cut.reshape(-1, *(1 for _ in range(end.dim() - 1))), end, torch.zeros_like(end))
