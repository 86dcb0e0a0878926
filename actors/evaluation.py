"""Held-out accuracy of the weights that the engines hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from actors.engines import EnginePool
from actors.reward_pool import RewardPool
from actors.stream import score_samples, training_sampling
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.types import Metrics


class HeldOut:
    """Mean clean reward per split: ``accuracy`` over samples at the rollout temperature, and ``greedy``.

    The same seeds at every evaluation, so that two of them differ by the policy alone.
    """

    def __init__(self, config: Config, splits: Mapping[str, Dataset], engines: EnginePool, rewards: RewardPool):
        self.config, self.splits, self.engines, self.rewards = config, splits, engines, rewards

    def run(self, step: int) -> Metrics:
        sampled = dataclasses.replace(training_sampling(self.config), n=self.config.trainer.eval_samples)
        greedy = dataclasses.replace(sampled, n=1, temperature=0.0, top_p=1.0, top_k=-1)
        metrics: Metrics = {}
        for split, data in self.splits.items():
            prompts = list(data.prompts)
            for name, sampling in (("accuracy", sampled), ("greedy", greedy)):
                groups = self.engines.generate(prompts, sampling, run_seed=self.config.trainer.seed, step=-1)
                scores = score_samples(
                    self.rewards, prompts, groups, run_seed=self.config.trainer.seed, step=-1, noisy=False
                )
                clean = [s.clean for group in scores for s in group if s.error is None]
                metrics[f"eval/{split}/{name}"] = sum(clean) / len(clean) if clean else math.nan
        return metrics
