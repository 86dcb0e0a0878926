"""Compare two arms by pairs of runs with the same seed: differences, their interval, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dvpo_service.eval_stats import LEVEL, mean_interval
from tune_sweeps.measures import mean, values_by_seed
from tune_sweeps.records import Sweep, Trial

Verdict = Literal["higher", "lower", "the seeds cannot tell"]
UNSURE: Verdict = "the seeds cannot tell"
MIN_PAIRS = 3  # with fewer pairs there is no interval


@dataclass(frozen=True)
class Comparison:
    """An arm minus the reference, paired by seed, in the unit of the measure.

    Attributes:
      by_seed: the difference of each pair.
      arm_mean, reference_mean: means of the two arms over the paired seeds.
      mean: mean of the differences.
      low, high: Student's t interval of ``mean``, at LEVEL.
      reason: why the verdict was given, in words.
    """

    arm: str
    measure: str
    by_seed: dict[int, float]
    arm_mean: float | None
    reference_mean: float | None
    mean: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    reason: str


def compare(
    sweep: Sweep, arm: str, reference: str | None, measure: str, value: Callable[[Trial], float | None]
) -> Comparison:
    """Return the comparison of an arm with the reference.

    Args:
      measure: name of what is compared.
      value: returns the measure of a trial, or None; it is called for finished trials only.
    """
    of_arm, of_reference = values_by_seed(sweep, arm, value), values_by_seed(sweep, reference, value)
    seeds = [seed for seed in of_arm if seed in of_reference]
    by_seed = {seed: of_arm[seed] - of_reference[seed] for seed in seeds}
    low, high = interval(list(by_seed.values()))
    verdict, reason = judge(list(by_seed.values()), low, high)
    return Comparison(
        arm=arm,
        measure=measure,
        by_seed=by_seed,
        arm_mean=mean(of_arm[s] for s in seeds),
        reference_mean=mean(of_reference[s] for s in seeds),
        mean=mean(by_seed.values()),
        low=low,
        high=high,
        verdict=verdict,
        reason=reason,
    )


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """Return Student's t interval (low, high) of the mean of the differences, as `dvpo eval` does, at LEVEL.

    With fewer than MIN_PAIRS differences it is (None, None). A bootstrap over three to eight seeds is too narrow: its
    95% interval covers 75 % to 89 %.
    """
    if len(differences) < MIN_PAIRS:
        return None, None
    return mean_interval(differences) or (None, None)


def judge(differences: Sequence[float], low: float | None, high: float | None) -> tuple[Verdict, str]:
    """Return the verdict on paired differences, and the reason for it.

    The verdict is a direction only if all differences have the same sign and the interval does not contain 0.
    """
    n = len(differences)
    if low is None or high is None:
        return UNSURE, f"{n} {'pair' if n == 1 else 'pairs'} of seeds; an interval needs {MIN_PAIRS}"
    if not any(differences):
        return UNSURE, "no difference at all"
    if not (all(d > 0 for d in differences) or all(d < 0 for d in differences)):
        return UNSURE, "the seeds do not agree on the sign"
    if low <= 0 <= high:
        return UNSURE, "the interval contains 0"
    return ("higher" if low > 0 else "lower"), f"all {n} seeds agree"


def by_chance(comparisons: Sequence[Comparison]) -> float:
    """Return how many comparisons would get a direction by chance, at most, if no arm differed from the reference.

    A direction needs an interval without 0, which differences around 0 give once in 20 (1 - LEVEL). Equal signs are
    asked for on top.
    """
    return (1 - LEVEL) * sum(c.low is not None for c in comparisons)
