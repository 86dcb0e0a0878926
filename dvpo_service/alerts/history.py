"""What the rules may look at: this step's metrics, and a little of each metric's past."""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW = 10  # measurements in a running mean
_ACCURACY = re.compile(r"eval/[^/]+/accuracy")


class Missing(KeyError):
    """A metric that a rule wants was not measured at this step, or is not finite."""


@dataclass
class Past:
    """What is kept of one metric."""

    first: float
    highest: float = -math.inf
    best_mean: float = -math.inf  # highest mean of WINDOW measurements in a row
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        self.recent.append(value)
        self.highest = max(self.highest, value)
        if len(self.recent) == WINDOW:
            self.best_mean = max(self.best_mean, self.mean)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.recent)

    @property
    def sd(self) -> float:
        """Population standard deviation of the recent measurements."""
        return statistics.pstdev(self.recent)


class History:
    """``history[name]`` is this step's measurement; it raises Missing where there is none.

    Args:
      max_grad_norm: the gradient clip of "policy" and "critic".
    """

    def __init__(self, max_grad_norm: Mapping[str, float]) -> None:
        self.max_grad_norm = max_grad_norm
        self._now: dict[str, float] = {}
        self._past: dict[str, Past] = {}
        self._reward_at_best: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """The next step's metrics; NaN and infinity count as not measured, as in metrics.jsonl."""
        self._now = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        new_best = [n for n in self.accuracies() if n not in self._past or self._now[n] >= self._past[n].highest]
        for name, value in self._now.items():
            self._past.setdefault(name, Past(first=value)).add(value)
        reward = self._past.get("reward/mean")
        self._reward_at_best |= dict.fromkeys(new_best, reward.mean if reward else math.nan)

    def __getitem__(self, name: str) -> float:
        if name not in self._now:
            raise Missing(name)
        return self._now[name]

    def past(self, name: str) -> Past:
        """Of a metric measured at this step, this measurement included. Raises Missing."""
        self[name]
        return self._past[name]

    def measured(self, *names: str) -> list[float]:
        """This step's measurements of those ``names`` that have one. Raises Missing if none has."""
        found = [self._now[name] for name in names if name in self._now]
        if not found:
            raise Missing(*names)
        return found

    def accuracies(self) -> list[str]:
        """Names of this step's ``eval/<split>/accuracy``."""
        return [name for name in self._now if _ACCURACY.fullmatch(name)]

    def reward_at_best(self, accuracy: str) -> float:
        """The training reward's running mean when ``accuracy`` was at its highest. Raises Missing."""
        found = self._reward_at_best[accuracy]
        # The evaluation before training has no reward beside it: the first one measured stands for it.
        return self.past("reward/mean").first if math.isnan(found) else found
