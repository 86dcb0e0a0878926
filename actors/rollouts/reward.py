"""A CPU actor that scores groups of responses with a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from actors.cluster.process import memory_bound
from dvpo_service.config import RewardConfig
from dvpo_service.rewards.noise import NoiseSpec, score_group
from dvpo_service.rewards.scoring import resolve
from dvpo_service.types import Score


class Work(NamedTuple):
    """What a worker needs to score one prompt.

    Attributes:
      responses: the sampled texts.
      answer: the prompt's reference answer.
      seeds: one per response, for the noise.
      source: the dataset that the prompt is from; it selects the noise.
    """

    responses: list[str]
    answer: str
    seeds: list[int]
    source: str = ""


class RewardWorker:
    """Scores in its own process, so a reward function that hangs or crashes ends this actor only."""

    def __init__(self, config: RewardConfig):
        self.function = resolve(config.function)
        self.max_memory_gib = config.max_memory_gib
        self.noise = NoiseSpec(**config.noise.model_dump())
        self.noise_by_source = {s: NoiseSpec(**noise.model_dump()) for s, noise in config.noise_by_source.items()}

    def ready(self) -> None:
        """Return; the answer shows that the function was loaded. Also the heartbeat."""

    def score(self, groups: Sequence[Work], noisy: bool) -> list[list[Score]]:
        """Return the scores of every group, in the order given.

        Args:
          groups: what to score.
          noisy: add the configured noise to the rewards. False is for evaluation: reward and clean reward are equal.
        """
        with memory_bound(self.max_memory_gib):
            return [
                score_group(
                    work.responses,
                    work.answer,
                    score=self.function,
                    noise=self.noise_by_source.get(work.source, self.noise) if noisy else NoiseSpec("none"),
                    seeds=work.seeds,
                )
                for work in groups
            ]
