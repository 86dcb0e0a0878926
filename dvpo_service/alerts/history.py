"""The data that conditions read: this step's metrics, and a summary of each metric's past."""

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
    """A metric that a rule needs was not measured at this step, or is not finite."""


@dataclass
class Past:
    """The past of one metric: its first and its highest value, its best running mean, and the last measurements."""

    first: float
    highest: float = -math.inf
    best_mean: float = -math.inf  # the highest mean of WINDOW measurements in a row
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        """Add a measurement."""
        self.recent.append(value)
        self.highest = max(self.highest, value)
        if len(self.recent) == WINDOW:
            self.best_mean = max(self.best_mean, self.mean)

    @property
    def mean(self) -> float:
        """Return the mean of the recent measurements."""
        return statistics.fmean(self.recent)

    @property
    def sd(self) -> float:
        """Return the population standard deviation of the recent measurements."""
        return statistics.pstdev(self.recent)


class History:
    """The metrics of this step and of the steps before.

    ``history[name]`` is this step's measurement, and raises Missing when there is none.

    Args:
      max_grad_norm: the gradient clip of "policy" and "critic".
    """

    def __init__(self, max_grad_norm: Mapping[str, float]) -> None:
        self.max_grad_norm = max_grad_norm
        self._now: dict[str, float] = {}
        self._past: dict[str, Past] = {}
        self._reward_at_best: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Go on to the next step. NaN and infinity count as not measured, as in metrics.jsonl."""
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
        """Return the past of a metric, including this step. Raises Missing when it was not measured at this step."""
        if name not in self._now:
            raise Missing(name)
        return self._past[name]

    def measured(self, *names: str) -> list[float]:
        """Return this step's measurements of those ``names`` that have one. Raises Missing when none has one."""
        values = [self._now[name] for name in names if name in self._now]
        if not values:
            raise Missing(*names)
        return values

    def accuracies(self) -> list[str]:
        """Return the names ``eval/<split>/accuracy`` of this step's metrics."""
        return [name for name in self._now if _ACCURACY.fullmatch(name)]

    def reward_at_best(self, accuracy: str) -> float:
        """Return the running mean of the training reward when ``accuracy`` was at its highest.

        Raises:
          Missing: the highest accuracy was measured before the first reward, and this step has no reward.
        """
        reward = self._reward_at_best[accuracy]
        # No reward was measured with the evaluation before training, so the first reward takes its place.
        return self.past("reward/mean").first if math.isnan(reward) else reward
