"""Evaluation on held-out prompts, with the weights that the engines hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from actors.rollouts.engines import EnginePool, Sampler
from actors.rollouts.reward import Rewards
from actors.rollouts.stream import score_samples, training_sampling
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.eval_stats import PromptScores
from dvpo_service.types import Metrics, Prompt, Sampling, Score


class HeldOutEvaluator:
    """Measures rewards without noise, of samples at the rollout temperature and of greedy samples.

    Every evaluation uses the same seeds, so two evaluations differ by the policy alone.

    Args:
      splits: the held-out datasets by name.
    """

    def __init__(self, config: Config, splits: Mapping[str, Dataset], engines: Sampler | EnginePool, rewards: Rewards):
        self.config, self.splits, self.engines, self.rewards = config, splits, engines, rewards

    def run(self, step: int) -> Metrics:
        """Return two means for every split, over the samples that could be scored; NaN if none could.

        ``eval/<split>/accuracy`` is over ``trainer.eval_samples`` samples of each prompt, ``eval/<split>/greedy`` over
        one greedy sample each. ``eval/<split>/graded``, the share of rewards that are neither 0 nor 1, is there only
        where it is not 0: the accuracy is then a mean of grades.
        """
        metrics: Metrics = {}
        for split, data in self.splits.items():
            for name, sampling in self._samplings(self.config.trainer.eval_samples).items():
                clean = [s for group in self._score(data.prompts, sampling) for s in _clean_rewards(group)]
                metrics[f"eval/{split}/{name}"] = sum(clean) / len(clean) if clean else math.nan
                graded = sum(reward not in (0.0, 1.0) for reward in clean)
                if graded and name == "accuracy":
                    metrics[f"eval/{split}/graded"] = graded / len(clean)
        return metrics

    def measure(self, n: int, on_progress: Callable[[int], None]) -> list[PromptScores]:
        """Score ``n`` samples and one greedy sample of every prompt.

        Args:
          n: samples per prompt.
          on_progress: called with the number of prompts done so far.

        Returns:
          The scores of every prompt, split by split.
        """
        samplings = self._samplings(n)
        # Prompts per call, so that a call has as many sequences as the engines run side by side.
        size = max(1, self.config.rollout.num_engines * self.config.rollout.max_num_seqs // n)
        results: list[PromptScores] = []
        for split, data in self.splits.items():
            for start in range(0, len(data), size):
                prompts = data.prompts[start : start + size]
                sampled = self._score(prompts, samplings["accuracy"])
                greedy = self._score(prompts, samplings["greedy"])
                results += [_prompt_scores(split, *each) for each in zip(prompts, sampled, greedy, strict=True)]
                on_progress(len(results))
        return results

    def _samplings(self, n: int) -> dict[str, Sampling]:
        sampled = dataclasses.replace(training_sampling(self.config), n=n)
        return {
            "accuracy": sampled,
            "greedy": dataclasses.replace(sampled, n=1, temperature=0.0, top_p=1.0, top_k=-1),
        }

    def _score(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Score]]:
        seed = self.config.trainer.seed
        prompts = list(prompts)
        groups = self.engines.generate(prompts, sampling, run_seed=seed, step=-1)
        return score_samples(self.rewards, prompts, groups, run_seed=seed, step=-1, noisy=False)


def _clean_rewards(group: Sequence[Score]) -> list[float]:
    """Return the clean rewards of the samples that could be scored."""
    return [s.clean for s in group if s.error is None]


def _prompt_scores(split: str, prompt: Prompt, sampled: Sequence[Score], greedy: Sequence[Score]) -> PromptScores:
    rewards = _clean_rewards(sampled)
    greedy_rewards = _clean_rewards(greedy)
    return PromptScores(
        split,
        prompt.source,
        tuple(rewards),
        greedy_rewards[0] if greedy_rewards else None,
        len(sampled) - len(rewards),
    )
