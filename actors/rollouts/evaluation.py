"""How well the weights that the engines hold answer held-out prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from actors.rollouts.engines import EnginePool, Sampler
from actors.rollouts.reward_pool import RewardPool
from actors.rollouts.stream import score_samples, training_sampling
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.eval_stats import PromptScores
from dvpo_service.types import Metrics, Prompt, Sampling, Score


class HeldOutEvaluator:
    """Rewards without noise, of samples at the rollout temperature and of greedy ones.

    The same seeds at every evaluation, so that two of them differ by the policy alone.
    """

    def __init__(
        self, config: Config, splits: Mapping[str, Dataset], engines: Sampler | EnginePool, rewards: RewardPool
    ):
        self.config, self.splits, self.engines, self.rewards = config, splits, engines, rewards

    def run(self, step: int) -> Metrics:
        """Mean per split: ``accuracy`` over ``trainer.eval_samples`` samples of each prompt, and ``greedy``."""
        metrics: Metrics = {}
        for split, data in self.splits.items():
            for name, sampling in self._samplings(self.config.trainer.eval_samples).items():
                clean = [s for group in self._score(data.prompts, sampling) for s in _clean(group)]
                metrics[f"eval/{split}/{name}"] = sum(clean) / len(clean) if clean else math.nan
        return metrics

    def measure(self, n: int, on_progress: Callable[[int], None]) -> list[PromptScores]:
        """``n`` samples of every prompt and a greedy one; ``on_progress`` gets the number of prompts done."""
        samplings = self._samplings(n)
        # As many sequences at a time as the engines run side by side.
        size = max(1, self.config.rollout.num_engines * self.config.rollout.max_num_seqs // n)
        found: list[PromptScores] = []
        for split, data in self.splits.items():
            for start in range(0, len(data), size):
                prompts = data.prompts[start : start + size]
                sampled, greedy = (self._score(prompts, samplings[name]) for name in ("accuracy", "greedy"))
                found += [_result(split, *each) for each in zip(prompts, sampled, greedy, strict=True)]
                on_progress(len(found))
        return found

    def _samplings(self, n: int) -> dict[str, Sampling]:
        sampled = dataclasses.replace(training_sampling(self.config), n=n)
        return {
            "accuracy": sampled,
            "greedy": dataclasses.replace(sampled, n=1, temperature=0.0, top_p=1.0, top_k=-1),
        }

    def _score(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Score]]:
        seed, prompts = self.config.trainer.seed, list(prompts)
        groups = self.engines.generate(prompts, sampling, run_seed=seed, step=-1)
        return score_samples(self.rewards, prompts, groups, run_seed=seed, step=-1, noisy=False)


def _clean(group: Sequence[Score]) -> list[float]:
    return [s.clean for s in group if s.error is None]


def _result(split: str, prompt: Prompt, sampled: Sequence[Score], greedy: Sequence[Score]) -> PromptScores:
    scored, best = _clean(sampled), _clean(greedy)
    return PromptScores(split, prompt.source, tuple(scored), best[0] if best else None, len(sampled) - len(scored))
