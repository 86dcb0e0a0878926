"""The rollout stream: cursor -> engines -> rewards -> a scored batch. Synchronous: staleness 0."""

from __future__ import annotations

import time

from actors.engines import EnginePool
from actors.reward import Group
from actors.reward_pool import RewardPool
from actors.rollout import Sampling
from dvpo_service.config import Config
from dvpo_service.data.collate import collate, readable_rows, rollout_metrics
from dvpo_service.data.cursor import CursorState, PromptCursor
from dvpo_service.data.dataset import Dataset
from dvpo_service.rewards.noise import sample_seed
from dvpo_service.types import Generated, Prompt, Sample, Score


def training_sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.n, rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)


def score_samples(
    rewards: RewardPool,
    prompts: list[Prompt],
    groups: list[list[Sample]],
    *,
    run_seed: int,
    step: int,
    noisy: bool,
) -> list[list[Score]]:
    """Scores per group; the noise of a sample depends on the seed, the step and the sample only."""
    work: list[Group] = [
        (
            [s.text for s in group],
            p.answer,
            [sample_seed(run_seed, step, p.index, s.sample_index) for s in group],
        )
        for p, group in zip(prompts, groups, strict=True)
    ]
    return rewards.score(work, noisy=noisy)


class SyncStream:
    """Generates a batch when asked, with the weights of that moment."""

    def __init__(self, config: Config, data: Dataset, engines: EnginePool, rewards: RewardPool):
        self.config, self.data, self.engines, self.rewards = config, data, engines, rewards
        self.cursor = PromptCursor(len(data.prompts), config.trainer.seed)

    def next(self, step: int) -> Generated:
        """The next ``prompts_per_step`` prompts, sampled ``n`` times each and scored."""
        config, seed = self.config, self.config.trainer.seed
        prompts = [self.data.prompts[i] for i in self.cursor.take(config.rollout.prompts_per_step)]
        start = time.perf_counter()
        groups = self.engines.generate(prompts, training_sampling(config), run_seed=seed, step=step)
        generated = time.perf_counter()
        scores = score_samples(self.rewards, prompts, groups, run_seed=seed, step=step, noisy=True)
        scored = time.perf_counter()
        rollouts = collate(prompts, groups, scores)
        metrics = rollout_metrics(rollouts, config.rollout.n, version=step)
        metrics["rollout/tokens_per_s"] = metrics.pop("rollout/tokens") / (generated - start)
        metrics |= {
            "time/generate": generated - start,
            "time/score": scored - generated,
            "data/epoch": float(self.cursor.epoch),
        }
        return Generated(rollouts, readable_rows(prompts, groups, scores), metrics)

    def state_dict(self) -> CursorState:
        return self.cursor.state_dict()

    def load_state_dict(self, state: CursorState) -> None:
        self.cursor.load_state_dict(state)
