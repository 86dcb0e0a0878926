"""Noise on the scores of the responses to a prompt, which depends only on the seeds."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from dvpo_service.algo.choices import NoiseKind, SpikeSign
from dvpo_service.errors import ConfigError
from dvpo_service.types import Score


@dataclass(frozen=True)
class NoiseSpec:
    """A kind of noise.

    Attributes:
      p: the probability of ``flip`` and ``spike``.
      sd: the standard deviation of ``gaussian``, and of a ``spike``, in units of the reward.
      sign: whether spikes go both ways, or only ``up`` or ``down`` (then a spike's size is that of a normal draw).
      df, scale: degrees of freedom of ``student_t``, 1 (Cauchy) or more, and its scale in units of the reward.

    Raises:
      ConfigError: an unknown kind or sign, or a number out of range.
    """

    kind: NoiseKind = "none"
    p: float = 0.0
    sd: float = 0.0
    sign: SpikeSign = "both"
    df: float = 2.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(NoiseKind):
            raise ConfigError(f"noise kind {self.kind!r}: use one of {', '.join(get_args(NoiseKind))}")
        if not 0 <= self.p <= 1:
            raise ConfigError(f"noise p={self.p}: a probability is from 0 to 1")
        if not 0 <= self.sd < math.inf:
            raise ConfigError(f"noise sd={self.sd}: a standard deviation is finite and not negative")
        if self.sign not in get_args(SpikeSign):
            raise ConfigError(f"noise sign={self.sign!r}: use one of {', '.join(get_args(SpikeSign))}")
        if not 1 <= self.df < math.inf:
            raise ConfigError(f"noise df={self.df}: degrees of freedom are finite and at least 1 (Cauchy)")
        if not 0 <= self.scale < math.inf:
            raise ConfigError(f"noise scale={self.scale}: a scale is finite and not negative")


def add_noise(
    scores: Sequence[Score], *, noise: NoiseSpec, seeds: Sequence[int], votes: Sequence[str | None] = ()
) -> list[Score]:
    """Return the scores of one prompt's responses with noise on ``reward``; ``clean`` and failed samples stay.

    ``majority_vote`` takes the group's most frequent answer as the right one; ``seeds[0]`` breaks ties, and failed
    samples do not vote.

    Args:
      seeds: one per response.
      votes: for ``majority_vote``, each response's answer, or None.

    Raises:
      ValueError: there are not as many seeds as scores.
    """
    if len(scores) != len(seeds):
        raise ValueError(f"{len(scores)} responses but {len(seeds)} seeds")
    if noise.kind == "majority_vote":
        return _majority_vote(scores, votes, seeds)
    return [_noisy(score, noise, seed) for score, seed in zip(scores, seeds, strict=True)]


def _noisy(score: Score, noise: NoiseSpec, seed: int) -> Score:
    if score.error or noise.kind == "none":
        return score
    rng = random.Random(seed)
    if noise.kind != "flip":
        return replace(score, reward=score.reward + _ADDED[noise.kind](noise, rng))
    if not 0 <= score.reward <= 1:
        error = f"flip noise needs an outcome from 0 to 1, got {score.reward}"
        return replace(score, reward=math.nan, clean=math.nan, error=error)
    return replace(score, reward=1 - score.reward if rng.random() < noise.p else score.reward)


def _gaussian(noise: NoiseSpec, rng: random.Random) -> float:
    return rng.gauss(0.0, noise.sd)


def _spike(noise: NoiseSpec, rng: random.Random) -> float:
    if rng.random() >= noise.p:
        return 0.0
    spike = rng.gauss(0.0, noise.sd)
    return {"both": spike, "up": abs(spike), "down": -abs(spike)}[noise.sign]


def _student_t(noise: NoiseSpec, rng: random.Random) -> float:
    """Return a normal draw over the root of an independent chi-squared draw divided by its degrees of freedom."""
    chi_squared = 2 * rng.gammavariate(noise.df / 2, 1.0)
    return noise.scale * rng.gauss(0.0, 1.0) / math.sqrt(chi_squared / noise.df)


# What is added to a reward, by kind.
_ADDED: Mapping[str, Callable[[NoiseSpec, random.Random], float]] = {
    "gaussian": _gaussian,
    "spike": _spike,
    "student_t": _student_t,
}


def _majority_vote(scores: Sequence[Score], votes: Sequence[str | None], seeds: Sequence[int]) -> list[Score]:
    answers = [None if score.error else vote for score, vote in zip(scores, votes, strict=True)]
    count = Counter(a for a in answers if a is not None)
    most = max(count.values(), default=0)
    tied = sorted(a for a, times in count.items() if times == most)
    label = random.Random(seeds[0]).choice(tied) if tied else None
    return [
        s if s.error else replace(s, reward=float(a is not None and a == label))
        for a, s in zip(answers, scores, strict=True)
    ]
