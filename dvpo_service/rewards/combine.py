"""Make the reward of every response from what one or several rewards gave it: normalise, weigh, sum, add noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dvpo_service.config.rewards import RewardConfig, RewardPart
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.noise import NoiseSpec, add_noise
from dvpo_service.rewards.scoring import Result
from dvpo_service.types import PartScore, Score

EPS = 1e-6  # added to a standard deviation, as by GRPO (algo/baselines/grpo.py)

NO_REWARD = "none of reward.rewards scores the prompt's source"

# What the rewards of one prompt gave: results per response, by the reward's number in ``RewardConfig.parts``.
GroupResults = Mapping[int, Sequence[Result]]


def combine(
    config: RewardConfig, groups: Sequence[Work], results: Sequence[GroupResults], *, training: bool
) -> list[list[Score]]:
    """Return the scores of every group.

    ``clean`` is the weighted sum. ``reward`` is that too in an evaluation; in training it is the weighted sum of the
    normalised scores (``config.normalise``) with noise, within ``config.clip``. A response that a reward with a weight
    could not score has failed: it has no reward, and counts in no mean or standard deviation.

    Args:
      results: for each group, the results of the rewards that score its source.
      training: normalise, and add noise.
    """
    parts = config.parts
    gained = normalised(config.normalise if training else "none", results)
    scores = [
        [_score(config, parts, result, gain, i) for i in range(len(work.responses))]
        for work, result, gain in zip(groups, results, gained, strict=True)
    ]
    if not training:
        return scores
    return [_noisy(config, *each) for each in zip(groups, results, scores, strict=True)]


def normalised(how: str, results: Sequence[GroupResults]) -> list[dict[int, np.ndarray]]:
    """Return each reward's scores, NaN where it failed, as ``(x - mean) / (sd + EPS)``.

    Mean and sample standard deviation (n - 1) are those of the reward's scores for one prompt (``group``) or for all
    prompts of the call (``batch``); where one response has a score, or all have the same, the result is 0. ``none``
    returns the scores as they are. Group-wise, then summed with weights, is GDPO (arXiv 2601.05242).
    """
    raw = [{k: np.array([r.value for r in found]) for k, found in group.items()} for group in results]
    if how == "none":
        return raw
    if how == "group":
        return [{k: _standard(x, x) for k, x in group.items()} for group in raw]
    among = {k: np.concatenate([g[k] for g in raw if k in g]) for k in {k for g in raw for k in g}}
    return [{k: _standard(x, among[k]) for k, x in group.items()} for group in raw]


def _standard(x: np.ndarray, among: np.ndarray) -> np.ndarray:
    among = among[np.isfinite(among)]
    if len(among) < 2 or among.min() == among.max():
        return x * 0.0
    return (x - among.mean()) / (among.std(ddof=1) + EPS)


def _score(
    config: RewardConfig,
    parts: Sequence[RewardPart],
    results: GroupResults,
    gained: Mapping[int, np.ndarray],
    i: int,
) -> Score:
    """Return the score of response ``i`` of a group."""
    several = config.rewards is not None
    metrics: dict[str, float] = {}
    errors = [] if results else [NO_REWARD]
    shares, clean, reward = [], 0.0, 0.0
    for k, found in results.items():
        part, result = parts[k], found[i]
        metrics |= {f"{part.name}/{name}" if several else name: value for name, value in result.metrics.items()}
        weighted = part.weight * float(gained[k][i])
        shares.append(PartScore(part.name, result.value, part.weight * result.value))
        if part.weight == 0:
            continue  # it is only measured, so its failure costs nothing
        if result.error is not None:
            errors.append(f"{part.name}: {result.error}" if several else result.error)
        clean += part.weight * result.value
        reward += weighted
    shown = tuple(shares) if several else ()
    if errors:
        return Score(math.nan, math.nan, "; ".join(errors), metrics, shown)
    return Score(reward, clean, None, metrics, shown)


def _noisy(config: RewardConfig, work: Work, results: GroupResults, scores: list[Score]) -> list[Score]:
    noise = NoiseSpec(**config.noise_by_source.get(work.source, config.noise).model_dump())
    votes = [result.vote for result in next(iter(results.values()), [])]
    noisy = add_noise(scores, noise=noise, seeds=work.seeds, votes=votes)
    if config.clip is None:
        return noisy
    low, high = config.clip
    return [
        replace(score, reward=min(max(score.reward, low), high)) if score.error is None else score for score in noisy
    ]
