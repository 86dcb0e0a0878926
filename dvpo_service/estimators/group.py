"""Advantages without a critic: ``adv_estimator: grpo, dr_grpo, rloo, reinforce_plus_plus``, or the user's own."""

from __future__ import annotations

from torch import Tensor

from dvpo_service.algo.baselines.dr_grpo import dr_grpo
from dvpo_service.algo.baselines.grpo import grpo
from dvpo_service.algo.baselines.reinforce_plus_plus import reinforce_plus_plus
from dvpo_service.algo.baselines.rloo import rloo
from dvpo_service.config import AlgorithmConfig
from dvpo_service.registry import estimators
from dvpo_service.runs.integrity import Written
from dvpo_service.runs.storage import StoragePath
from dvpo_service.types import Advantages, Metrics, Rollouts, advantage_metrics


def grpo_advantages(rollouts: Rollouts, algorithm: AlgorithmConfig) -> Tensor:
    """Return GRPO's advantages [B, T] (arXiv 2402.03300)."""
    return grpo(rollouts.rewards, rollouts.response_mask, rollouts.prompt_index)


def dr_grpo_advantages(rollouts: Rollouts, algorithm: AlgorithmConfig) -> Tensor:
    """Return Dr. GRPO's advantages [B, T] (arXiv 2503.20783)."""
    return dr_grpo(rollouts.rewards, rollouts.response_mask, rollouts.prompt_index)


def rloo_advantages(rollouts: Rollouts, algorithm: AlgorithmConfig) -> Tensor:
    """Return RLOO's leave-one-out advantages [B, T] (arXiv 2402.14740)."""
    return rloo(rollouts.rewards, rollouts.response_mask, rollouts.prompt_index)


def reinforce_plus_plus_advantages(rollouts: Rollouts, algorithm: AlgorithmConfig) -> Tensor:
    """Return REINFORCE++'s advantages [B, T]: discounted returns (arXiv 2501.03262)."""
    return reinforce_plus_plus(rollouts.rewards, rollouts.response_mask, algorithm.gamma)


class NothingToUpdate:
    """The update of an estimator that learns nothing: a ``roles.Job`` that is done."""

    def result(self) -> Metrics:
        """Return no measurements."""
        return {}


class GroupEstimator:
    """A ``roles.Estimator`` around a ``GroupAdvantage``. It runs in the driver and has nothing to save."""

    def __init__(self, algorithm: AlgorithmConfig):
        self.algorithm = algorithm
        self.function = estimators.load(algorithm.adv_estimator)

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        """Return the advantages [B, T], not whitened, and their mean and standard deviation as metrics."""
        advantages = self.function(rollouts, self.algorithm)
        return Advantages(advantages), advantage_metrics(advantages, rollouts.response_mask)

    def update_async(self, rollouts: Rollouts, step: int) -> NothingToUpdate:
        """Return a job that is done: there is no critic to update."""
        return NothingToUpdate()

    def save(self, folder: StoragePath) -> Written:
        """Write nothing, and return a job that is done."""
        return Written({})

    def load(self, folder: StoragePath) -> None:
        """Do nothing: ``save`` wrote nothing."""

    def export(self, folder: StoragePath) -> None:
        """Do nothing: there is no critic to export."""
