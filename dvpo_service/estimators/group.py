"""``adv_estimator: grpo, dr_grpo, rloo, reinforce_plus_plus``: advantages without a critic."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dvpo_service.algo.baselines.dr_grpo import dr_grpo
from dvpo_service.algo.baselines.grpo import grpo
from dvpo_service.algo.baselines.reinforce_plus_plus import reinforce_plus_plus
from dvpo_service.algo.baselines.rloo import rloo
from dvpo_service.config import AlgorithmConfig
from dvpo_service.integrity import Written
from dvpo_service.storage import Place
from dvpo_service.types import Advantages, Metrics, Rollouts, advantage_metrics

COMPARE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


class Done:
    """The update of an estimator that has nothing to learn."""

    def result(self) -> Metrics:
        return {}


class GroupEstimator:
    """The loop's ``Estimator``, in the driver: nothing to train, nothing to save."""

    def __init__(self, algorithm: AlgorithmConfig):
        self.algorithm = algorithm

    def advantages(self, rollouts: Rollouts, step: int) -> tuple[Advantages, Metrics]:
        rewards, mask = rollouts.rewards, rollouts.response_mask
        if self.algorithm.adv_estimator == "reinforce_plus_plus":
            found = reinforce_plus_plus(rewards, mask, self.algorithm.gamma)
        else:
            found = COMPARE[self.algorithm.adv_estimator](rewards, mask, rollouts.prompt_index)
        return Advantages(found), advantage_metrics(found, mask)

    def update_async(self, rollouts: Rollouts, step: int) -> Done:
        return Done()

    def save(self, folder: Place) -> Written:
        return Written({})

    def load(self, folder: Place) -> None: ...
    def export(self, folder: Place) -> None: ...
