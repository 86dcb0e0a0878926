"""The guide's expectation for each removed loss term, the measurement that tests it, and whether it was met.

Measurements are of finished trials, in the units of the returns (loss terms: in the units of the term). "Late" means
the last fifth of a run's updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import stdev
from typing import Literal

from tune_sweeps.analysis import Analysis
from tune_sweeps.comparison import Comparison, compare
from tune_sweeps.measures import Column, accuracy, between, finished, late, series
from tune_sweeps.records import Sweep, Trial

Shown = Literal["shown", "not shown", "the seeds cannot tell", "not tested"]
Points = list[tuple[int, float]]
Measure = Callable[[Trial], float | None]


@dataclass(frozen=True)
class Expectation:
    """What the guide expects to happen without a term.

    Attributes:
      name: the term, in words.
      expects: the effect, in words.
      diagnostic: what is measured, in words.
      direction: where the measurement moves without the term, if the guide is right.
      percent: the measurement is a share, to be shown in points.
    """

    name: str
    expects: str
    diagnostic: str
    direction: Literal["higher", "lower"]
    percent: bool = False


@dataclass(frozen=True)
class GuideRow:
    """An expectation, the comparison that tests it, and whether the effect was shown, with the reason."""

    term: str
    arm: str
    expected: Expectation
    comparison: Comparison
    shown: Shown
    why: str


@dataclass(frozen=True)
class OwnLoss:
    """A comparison of ``critic/loss/<term>``, before its weight, between the arm without the term and the reference."""

    term: str
    arm: str
    comparison: Comparison  # of the late means


def guide_rows(sweep: Sweep, analysis: Analysis) -> list[GuideRow]:
    """Return a row for each arm that removes a term the guide has an expectation for; none without a reference."""
    if analysis.reference is None:
        return []
    book = expectations(analysis.columns)
    return [
        _row(sweep, arm.removes, arm.name, analysis.reference, *book[arm.removes])
        for arm in sweep.grid.arms
        if arm.removes in book and arm.name != analysis.reference and arm.removes
    ]


def own_losses(sweep: Sweep, analysis: Analysis) -> list[OwnLoss]:
    """Return the comparison of each removed term's own loss; none without a reference."""
    return [
        OwnLoss(arm.removes, arm.name, compare(sweep, arm.name, analysis.reference, metric, _late_mean(metric)))
        for arm in sweep.grid.arms
        if arm.removes and analysis.reference and arm.name != analysis.reference
        for metric in [f"critic/loss/{arm.removes}"]
    ]


def expectations(columns: Sequence[Column]) -> dict[str, tuple[Expectation, Measure]]:
    """Return the expectation and its measurement by term.

    Args:
      columns: the sweep's held-out columns; without any, there is no expectation for ``gain``.
    """
    book = dict(_OF_THE_CRITIC)
    if columns:
        column = next((c for c in columns if c.key == "ood"), columns[0])
        note = "" if column.key == "ood" else "; the sweep has no split out of distribution"
        diagnostic = f"held-out accuracy after training, {column.label}{note}"
        expected = Expectation("upper-tail gain", "a collapse of generalization", diagnostic, "lower", percent=True)
        book["gain"] = expected, partial(accuracy, column=column, name="held_out_after")
    return book


def _row(sweep: Sweep, term: str, arm: str, reference: str, expected: Expectation, measure: Measure) -> GuideRow:
    comparison = compare(sweep, arm, reference, expected.diagnostic, measure)
    both_ran = bool(finished(sweep, arm) and finished(sweep, reference))
    return GuideRow(term, arm, expected, comparison, *_shown(term, comparison, expected, both_ran))


def _shown(term: str, comparison: Comparison, expected: Expectation, both_ran: bool) -> tuple[Shown, str]:
    """Return whether the comparison shows the effect, and why."""
    if not comparison.by_seed and both_ran:
        reason = "the rewards had no noise" if term == "risk" else "not measured in both arms with the same seed"
        return "not tested", reason
    if comparison.verdict == "the seeds cannot tell":
        return "the seeds cannot tell", comparison.reason
    if comparison.verdict != expected.direction:
        return "not shown", f"{comparison.verdict}, the other way; {comparison.reason}"
    if term == "shift" and comparison.arm_mean is not None and comparison.arm_mean >= 0:
        return "not shown", "lower, but still no underestimation"
    return "shown", f"{comparison.verdict}; {comparison.reason}"


def _bias(trial: Trial) -> Points:
    """Return the critic's mean prediction minus the mean return, by step."""
    returns = dict(series(trial, "critic/return_mean"))
    return [(step, value - returns[step]) for step, value in series(trial, "critic/quantile_mean") if step in returns]


def _drift(trial: Trial) -> float | None:
    """Return how far the critic's bias moves from the second fifth of the updates to the last."""
    bias = _bias(trial)
    early, end = between(trial, bias, 0.2, 0.4), late(trial, bias)
    return None if early is None or end is None else abs(end - early)


def _tail_unrest(trial: Trial) -> float | None:
    """Return the standard deviation of the lower tail's changes from step to step; None for fewer than two changes.

    The first fifth of the updates is left out: there the critic still learns the level of the returns.
    """
    points = series(trial, "critic/lower_tail_mean")
    start = 0.2 * trial.metrics[-1]["step"] if trial.metrics else 0
    changes = [y - x for (a, x), (b, y) in pairwise(points) if b == a + 1 and a > start]
    return stdev(changes) if len(changes) > 1 else None


def _clean_under_noise(trial: Trial) -> float | None:
    """Return the late mean of the clean reward; None if the run's rewards had no noise."""
    clean: Mapping[int, float] = dict(series(trial, "reward/clean_mean"))
    noisy = any(step in clean and abs(value - clean[step]) > 1e-9 for step, value in series(trial, "reward/mean"))
    return late(trial, list(clean.items())) if noisy else None


def _late_mean(metric: str) -> Measure:
    return lambda trial: late(trial, series(trial, metric))


_OF_THE_CRITIC: dict[str, tuple[Expectation, Measure]] = {
    "cvar": (
        Expectation(
            "CVaR",
            "an unstable lower tail",
            "standard deviation of the step-to-step changes of critic/lower_tail_mean, after the first fifth",
            "higher",
        ),
        _tail_unrest,
    ),
    "consist": (
        Expectation("head consistency", "heads that disagree", "late mean of critic/head_disagreement", "higher"),
        _late_mean("critic/head_disagreement"),
    ),
    "risk": (
        Expectation(
            "risk weighting",
            "less robustness to noise",
            "late mean of reward/clean_mean, where reward/mean is noisy",
            "lower",
            percent=True,
        ),
        _clean_under_noise,
    ),
    "shape": (
        Expectation(
            "tail shape",
            "a critic that drifts",
            "how far critic/quantile_mean minus critic/return_mean moves from the second fifth to the last",
            "higher",
        ),
        _drift,
    ),
    "shift": (
        Expectation(
            "mean shift",
            "underestimation",
            "late mean of critic/quantile_mean minus critic/return_mean; also has to be below 0 without the term",
            "lower",
        ),
        lambda trial: late(trial, _bias(trial)),
    ),
    "curv": (
        Expectation(
            "tail curvature",
            "jagged quantiles",
            "late mean of critic/loss/curv, the measured curvature of the sorted tails (not critic/crossing_rate, "
            "which is of the atoms before sorting)",
            "higher",
        ),
        _late_mean("critic/loss/curv"),
    ),
}
