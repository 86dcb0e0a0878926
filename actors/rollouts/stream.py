"""The synchronous rollout stream: cursor -> engines -> rewards -> a scored batch, with staleness 0.

``ahead.py`` has the stream that generates ahead.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from actors.rollouts.cache import CachedBatch, RolloutCache
from actors.rollouts.engines import Sampler
from actors.rollouts.reward import Rewards, Work
from dvpo_service.config import Config
from dvpo_service.data.collate import collate, readable_rows, rollout_metrics
from dvpo_service.data.cursor import CursorState, PromptCursor
from dvpo_service.data.dataset import Dataset
from dvpo_service.data.ledger import Ledger
from dvpo_service.data.reward_metrics import reward_metrics
from dvpo_service.errors import RewardsFailed, one_line
from dvpo_service.rewards.overlong import overlong_penalty
from dvpo_service.rewards.seeds import sample_seed
from dvpo_service.types import Generated, Prompt, Rollouts, Sample, Sampling, Score


def training_sampling(config: Config) -> Sampling:
    """Return the sampling parameters of training."""
    rollout = config.rollout
    return Sampling(rollout.n, rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)


def score_samples(
    rewards: Rewards,
    prompts: list[Prompt],
    groups: list[list[Sample]],
    *,
    run_seed: int,
    step: int,
    noisy: bool,
) -> list[list[Score]]:
    """Return the scores of every group, in the order of ``groups``.

    Args:
      prompts: the prompt of each group.
      groups: samples by prompt.
      run_seed, step: with the sample's indices they seed its noise, so the noise depends on nothing else.
      noisy: whether rewards have noise.
    """
    work = [
        Work(
            [s.text for s in group],
            p.answer,
            [sample_seed(run_seed, step, p.index, s.sample_index, p.occurrence) for s in group],
            p.source,
            p.row,
            p.messages,
        )
        for p, group in zip(prompts, groups, strict=True)
    ]
    return rewards.score(work, noisy=noisy)


def penalised(config: Config, samples: list[Sample], scores: list[Score]) -> list[Score]:
    """Return the scores with the overlong penalty (DAPO, arXiv 2503.14476) added to the rewards.

    Clean rewards are unchanged, and without ``reward.overlong_buffer`` the rewards are too.
    """
    reward = config.reward
    if not reward.overlong_buffer:
        return scores
    penalty = overlong_penalty(
        torch.tensor([len(s.token_ids) for s in samples]),
        max_len=config.rollout.max_new_tokens,
        buffer=reward.overlong_buffer,
        factor=reward.overlong_penalty,
    )
    return [replace(s, reward=s.reward + p) for s, p in zip(scores, penalty.tolist(), strict=True)]


@dataclass(frozen=True)
class Group:
    """One prompt's samples with their scores, and their rewards before the overlong penalty."""

    prompt: Prompt
    samples: list[Sample]
    scores: list[Score]
    unpenalised: list[float]

    def has_zero_variance(self) -> bool:
        """Return whether all valid samples have the same reward, so that comparing them teaches nothing.

        Length does not count: of three right answers, a long one is as right as the others (DAPO, arXiv 2503.14476).
        """
        valid = zip(self.unpenalised, self.scores, strict=True)
        return len({reward for reward, score in valid if score.error is None}) < 2


def _count_useful(groups: list[Group]) -> int:
    return sum(not g.has_zero_variance() for g in groups)


def _collate(groups: list[Group]) -> Rollouts:
    return collate([g.prompt for g in groups], [g.samples for g in groups], [g.scores for g in groups])


class SyncStream:
    """Generates each batch when ``next`` asks for it, with the weights that the engines hold then."""

    def __init__(self, config: Config, data: Dataset, engines: Sampler, rewards: Rewards, ledger: Ledger):
        self.config, self.data, self.engines, self.rewards, self.ledger = config, data, engines, rewards, ledger
        self.cursor = PromptCursor(len(data.prompts), config.trainer.seed)
        self.cache = RolloutCache(config.rollout.reuse_gib)
        self.check: Callable[[], None] | None = None  # see EnginePool.generate

    def next(self, step: int) -> Generated:
        """Return the batch of ``step``, from the cache where a fault makes the step run again, or else sampled now."""
        return self._give(step, *self._make(step))

    def close(self) -> None:
        """Do nothing: no work is under way between two calls of ``next``."""

    def _give(self, step: int, batch: CachedBatch, reused: bool) -> Generated:
        """Write the batch to the ledger and return it. A reused batch reports no time for generation and scoring."""
        self.ledger.write(step, batch.prompts, batch.failed)
        generated = batch.generated
        count = float(len(generated.rollouts)) if reused else 0.0
        times = {name: 0.0 for name in generated.metrics if reused and name.startswith("time/")}
        return replace(generated, metrics=generated.metrics | times | {"rollout/reused": count})

    def _make(self, step: int) -> tuple[CachedBatch, bool]:
        """Return the batch of ``step`` and whether it came from the cache; move the cursor past its prompts."""
        before = self.cursor.state_dict()
        if batch := self.cache.find(step, before):
            self.cursor.load_state_dict(batch.after)
            return batch, True
        groups, generated = self._generate(step)
        failed = sum(s.error is not None for g in groups for s in g.scores)
        batch = CachedBatch(generated, [g.prompt.index for g in groups], failed, before, self.cursor.state_dict())
        self.cache.put(step, batch)
        return batch, False

    def _generate(self, step: int) -> tuple[list[Group], Generated]:
        """Sample the next ``prompts_per_step`` prompts ``n`` times each and score the samples.

        With ``dynamic_sampling`` (DAPO, arXiv 2503.14476) groups of zero variance are left out, and as many new prompts
        are drawn in their place, in at most ``max_draws`` draws. Groups that were left out fill what is missing then.
        Reward metrics cover every group drawn.

        Returns:
          (all groups drawn, the batch).
        """
        rollout = self.config.rollout
        size = rollout.prompts_per_step
        seconds = {"generate": 0.0, "score": 0.0}
        drawn = self._draw(size, step, [], seconds)
        draws = 1
        while rollout.dynamic_sampling and draws < rollout.max_draws:
            missing = size - _count_useful(drawn)
            if missing <= 0:
                break
            drawn += self._draw(missing, step, drawn, seconds)
            draws += 1
        self._check_scored(drawn, step)
        metrics = rollout_metrics(_collate(drawn), rollout.n, version=step)
        metrics |= reward_metrics([g.prompt for g in drawn], [g.scores for g in drawn])
        metrics["rollout/tokens_per_s"] = metrics.pop("rollout/tokens") / seconds["generate"]
        metrics |= {f"time/{stage}": s for stage, s in seconds.items()}
        metrics |= {"data/epoch": float(self.cursor.epoch), "rollout/draws": float(draws)}
        # The sort is stable: useful groups first, each kind in the order drawn.
        used = sorted(drawn, key=Group.has_zero_variance)[:size] if rollout.dynamic_sampling else drawn
        rows = readable_rows([g.prompt for g in used], [g.samples for g in used], [g.scores for g in used])
        return drawn, Generated(_collate(used), rows, metrics)

    def _draw(self, count: int, step: int, before: list[Group], seconds: dict[str, float]) -> list[Group]:
        """Sample and score the next ``count`` prompts; add the time that each stage took to ``seconds``.

        Args:
          before: the groups that the step has drawn already.
        """
        config = self.config
        seed = config.trainer.seed
        prompts = self._next_prompts(count, before)
        start = time.perf_counter()
        groups = self.engines.generate(prompts, training_sampling(config), run_seed=seed, step=step, check=self.check)
        generated = time.perf_counter()
        scores = score_samples(self.rewards, prompts, groups, run_seed=seed, step=step, noisy=True)
        seconds["generate"] += generated - start
        seconds["score"] += time.perf_counter() - generated
        return [
            Group(p, samples, penalised(config, samples, scored), [s.reward for s in scored])
            for p, samples, scored in zip(prompts, groups, scores, strict=True)
        ]

    def _check_scored(self, drawn: list[Group], step: int) -> None:
        """Raise RewardsFailed when no response of the step could be scored: there is nothing to learn from."""
        errors = [s.error for g in drawn for s in g.scores if s.error is not None]
        if errors and len(errors) == sum(len(g.scores) for g in drawn):
            raise RewardsFailed(
                f"none of the {len(errors)} responses of step {step + 1} could be scored. The first error of "
                f"reward ({self.config.reward.words}): {one_line(errors[0], 400)}. Mend the reward; the same command "
                "continues from the last checkpoint"
            )

    def _next_prompts(self, count: int, before: list[Group]) -> list[Prompt]:
        """Return the next prompts, each with the number of times that the step drew it before."""
        times = Counter(g.prompt.index for g in before)
        prompts = []
        for index in self.cursor.take(count):
            prompt = self.data.prompts[index]
            prompts.append(replace(prompt, occurrence=times[index]) if times[index] else prompt)
            times[index] += 1
        return prompts

    def state_dict(self) -> CursorState:
        """Return the cursor's state."""
        return self.cursor.state_dict()

    def load_state_dict(self, state: CursorState) -> None:
        """Set the cursor's state: the next batch starts there."""
        self.cursor.load_state_dict(state)
