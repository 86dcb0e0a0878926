"""A CPU actor that scores groups of responses with a pure function."""

from __future__ import annotations

from collections.abc import Sequence

from actors.process import memory_bound
from dvpo_service.config import RewardConfig
from dvpo_service.rewards.noise import NoiseSpec, score_group
from dvpo_service.rewards.scoring import resolve
from dvpo_service.types import Score

# One prompt's responses, its answer, and a seed per response for the noise.
Work = tuple[list[str], str, list[int]]


class RewardWorker:
    """Scores in its own process: a function that hangs or crashes takes down this actor only."""

    def __init__(self, config: RewardConfig):
        self.function = resolve(config.function)
        self.max_memory_gib = config.max_memory_gib
        self.noise = NoiseSpec(**config.noise.model_dump())

    def ready(self) -> None:
        """Answers once the function is loaded."""

    def score(self, groups: Sequence[Work], noisy: bool) -> list[list[Score]]:
        """Scores in the order given. ``noisy`` False measures: reward and clean reward are equal."""
        noise = self.noise if noisy else NoiseSpec("none")
        with memory_bound(self.max_memory_gib):
            return [
                score_group(responses, answer, score=self.function, noise=noise, seeds=seeds)
                for responses, answer, seeds in groups
            ]
