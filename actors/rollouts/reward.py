"""Actors that score groups of responses: one runs the config's functions and judges, the other a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from actors.cluster.process import memory_bound
from dvpo_service.config import RewardConfig
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.parts import load_part
from dvpo_service.rewards.scoring import Result
from dvpo_service.types import Score

__all__ = ["RewardModelWorker", "RewardWorker", "Rewards", "Work"]


class Rewards(Protocol):
    """The config's rewards, as the streams and the evaluation use them."""

    def score(self, groups: Sequence[Work], *, noisy: bool) -> list[list[Score]]:
        """See ``RewardPool.score``."""
        ...


class RewardWorker:
    """Scores in its own process, so a reward function that hangs or crashes ends this actor only."""

    def __init__(self, config: RewardConfig):
        self.config = config
        self.parts = {k: load_part(config, part) for k, part in enumerate(config.parts) if part.model is None}

    def ready(self) -> None:
        """Return; the answer shows that the functions were loaded. Also the heartbeat."""

    def score(self, part: int, groups: Sequence[Work]) -> list[list[Result]]:
        """Return the results of every group, in the order given.

        Args:
          part: the number of the reward in ``config.parts``.
          groups: what to score.
        """
        with memory_bound(self.config.max_memory_gib):
            return self.parts[part].score(groups)


class RewardModelWorker:
    """Holds a copy of the reward model of part number ``part``."""

    def __init__(self, config: RewardConfig, part: int):
        self.part = load_part(config, config.parts[part])

    def ready(self) -> None:
        """Return; the answer shows that the model is loaded. Also the heartbeat."""

    def score(self, part: int, groups: Sequence[Work]) -> list[list[Result]]:
        """Return the results of every group, in the order given; ``part`` is this worker's own."""
        return self.part.score(groups)
