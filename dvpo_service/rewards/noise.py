"""Score the responses to a prompt, with noise that depends only on the seeds."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from dvpo_service.algo.choices import NoiseKind, SpikeSign
from dvpo_service.errors import ConfigError
from dvpo_service.rewards import exact_match
from dvpo_service.rewards.scoring import NotANumber, ScoreFn, finite_number
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


def score_group(
    responses: Sequence[str], answer: str, *, score: ScoreFn, noise: NoiseSpec, seeds: Sequence[int]
) -> list[Score]:
    """Return one ``Score`` per response to one prompt, with ``clean`` beside the noisy ``reward``.

    A scoring function that raises, or returns something that is not a finite number, gives NaN and an ``error``, never
    0. ``majority_vote`` takes the group's most frequent answer as the right one; ``seeds[0]`` breaks ties, and failed
    samples do not vote.

    Args:
      seeds: one per response, for its noise.

    Raises:
      ValueError: there are not as many seeds as responses.
    """
    if len(responses) != len(seeds):
        raise ValueError(f"{len(responses)} responses but {len(seeds)} seeds")
    scores = [_clean(score, response, answer) for response in responses]
    if noise.kind == "majority_vote":
        extract: Callable[[str], str | None] = getattr(score, "extract", exact_match.extract)
        return _majority_vote(responses, scores, extract, seeds)
    return [_noisy(clean, noise, seed) for clean, seed in zip(scores, seeds, strict=True)]


def _failed(error: str) -> Score:
    return Score(math.nan, math.nan, error)


def _clean(score: ScoreFn, response: str, answer: str) -> Score:
    try:
        value = finite_number(score(response, answer))
    except NotANumber as error:
        return _failed(str(error))
    except Exception as error:  # noqa: BLE001 - user code may raise anything, and it is recorded
        return _failed(f"{type(error).__name__}: {error}")
    return Score(value, value)


def _noisy(score: Score, noise: NoiseSpec, seed: int) -> Score:
    if score.error or noise.kind == "none":
        return score
    rng = random.Random(seed)
    if noise.kind != "flip":
        return Score(score.clean + _ADDED[noise.kind](noise, rng), score.clean)
    if not 0 <= score.clean <= 1:
        return _failed(f"flip noise needs an outcome from 0 to 1, got {score.clean}")
    return Score(1 - score.clean if rng.random() < noise.p else score.clean, score.clean)


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


def _majority_vote(
    responses: Sequence[str],
    scores: Sequence[Score],
    extract: Callable[[str], str | None],
    seeds: Sequence[int],
) -> list[Score]:
    answers: list[str | None] = [None] * len(responses)
    scores = list(scores)
    for i, response in enumerate(responses):
        if scores[i].error:
            continue
        try:
            answers[i] = extract(response)
        except Exception as error:  # noqa: BLE001 - as in _clean
            scores[i] = _failed(f"{type(error).__name__}: {error}")
    votes = Counter(a for a in answers if a is not None)
    most = max(votes.values(), default=0)
    tied = sorted(a for a, count in votes.items() if count == most)
    label = random.Random(seeds[0]).choice(tied) if tied else None
    return [
        s if s.error else Score(float(a is not None and a == label), s.clean)
        for a, s in zip(answers, scores, strict=True)
    ]
