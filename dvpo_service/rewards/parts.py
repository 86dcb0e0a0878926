"""Load one of the config's rewards as what scores groups of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from dvpo_service.config.rewards import RewardConfig, RewardPart
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.judge import JudgePart, template_columns
from dvpo_service.rewards.scoring import Result, Scorer, resolve


class LoadedPart(Protocol):
    """A reward that can score."""

    def score(self, groups: Sequence[Work]) -> list[list[Result]]:
        """Return the results of every group, in the order given; it raises nothing for a response."""
        ...

    def attempt(self, work: Work) -> None:
        """Score once, and let whatever goes wrong through as an exception."""
        ...


def load_part(config: RewardConfig, part: RewardPart) -> LoadedPart:
    """Return what scores groups with ``part``. Raises ConfigError if it cannot be loaded."""
    if part.model:
        from dvpo_service.rewards.model import ModelPart  # imports torch, which other workers need not wait for

        return ModelPart(part.model)
    if part.judge:
        return JudgePart(part.judge, workers=config.num_workers, deadline_s=config.timeout_of(part))
    scorer = resolve(str(part.function))
    if scorer.name == "code":
        scorer = replace(scorer, score=partial(scorer.score, limits=config.code))
    return FunctionPart(config, part, scorer)


def columns_of(part: RewardPart) -> tuple[str, ...]:
    """Return the columns that ``part`` needs in every row that it scores. Raises ConfigError if it cannot be loaded."""
    if part.judge:
        return template_columns(part.judge)
    if part.model:
        return ()
    return resolve(str(part.function)).convention.columns


class FunctionPart:
    """A function of Python, built-in or the user's own."""

    def __init__(self, config: RewardConfig, part: RewardPart, scorer: Scorer):
        self.config, self.scorer = config, scorer
        self.timeout_s = config.timeout_of(part)

    def score(self, groups: Sequence[Work]) -> list[list[Result]]:
        """Return the results of every group."""
        return [self.scorer.results(w, timeout_s=self.timeout_s, votes=self._votes(w.source)) for w in groups]

    def attempt(self, work: Work) -> None:
        """Score once."""
        self.scorer.attempt(work)

    def _votes(self, source: str) -> bool:
        return self.config.noise_by_source.get(source, self.config.noise).kind == "majority_vote"
