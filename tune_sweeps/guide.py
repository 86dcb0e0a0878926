"""What the guide expects of each removed loss term, the measurement that would show it, and whether it did.

The measurements are of finished trials, in the units of the returns (loss terms: of the term). "Late" is the last
fifth of a run's updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import stdev
from typing import Literal

from tune_sweeps.analysis import (
    Analysis,
    Column,
    Comparison,
    accuracy,
    between,
    compare,
    finished,
    late,
    series,
)
from tune_sweeps.records import Sweep, Trial

Shown = Literal["shown", "not shown", "the seeds cannot tell", "not tested"]
Points = list[tuple[int, float]]
Measure = Callable[[Trial], float | None]


@dataclass(frozen=True)
class Expectation:
    """``direction``: where the measure goes without the term, if the guide is right."""

    name: str  # the term, in words
    expects: str
    diagnostic: str  # what is measured, in words
    direction: Literal["higher", "lower"]
    percent: bool = False  # a share, to be shown in points


@dataclass(frozen=True)
class GuideRow:
    term: str
    arm: str
    expected: Expectation
    comparison: Comparison
    shown: Shown
    why: str


@dataclass(frozen=True)
class OwnLoss:
    """``critic/loss/<term>``, as measured before its weight, in the arm without the term and in the reference."""

    term: str
    arm: str
    comparison: Comparison  # of the late means


def guide_rows(sweep: Sweep, analysis: Analysis) -> list[GuideRow]:
    """A row for each arm that removes a term of which the guide expects something; none without a reference."""
    if analysis.reference is None:
        return []
    book = expectations(analysis.columns)
    return [
        _row(sweep, arm.removes, arm.name, analysis.reference, *book[arm.removes])
        for arm in sweep.grid.arms
        if arm.removes in book and arm.name != analysis.reference and arm.removes
    ]


def own_losses(sweep: Sweep, analysis: Analysis) -> list[OwnLoss]:
    """For every removed term, expected of or not; none without a reference."""
    return [
        OwnLoss(arm.removes, arm.name, compare(sweep, arm.name, analysis.reference, metric, _late_mean(metric)))
        for arm in sweep.grid.arms
        if arm.removes and analysis.reference and arm.name != analysis.reference
        for metric in [f"critic/loss/{arm.removes}"]
    ]


def expectations(columns: Sequence[Column]) -> dict[str, tuple[Expectation, Measure]]:
    """By term, for a sweep with these held-out columns; without any, nothing is expected of ``gain``."""
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


def _shown(term: str, found: Comparison, expected: Expectation, both_ran: bool) -> tuple[Shown, str]:
    if not found.by_seed and both_ran:
        reason = "the rewards had no noise" if term == "risk" else "not measured in both arms with the same seed"
        return "not tested", reason
    if found.verdict == "the seeds cannot tell":
        return "the seeds cannot tell", found.reason
    if found.verdict != expected.direction:
        return "not shown", f"{found.verdict}, the other way; {found.reason}"
    if term == "shift" and found.arm_mean is not None and found.arm_mean >= 0:
        return "not shown", "lower, but still no underestimation"
    return "shown", f"{found.verdict}; {found.reason}"


def _bias(trial: Trial) -> Points:
    """What the critic predicts on average minus what came, by step."""
    returns = dict(series(trial, "critic/return_mean"))
    return [(step, value - returns[step]) for step, value in series(trial, "critic/quantile_mean") if step in returns]


def _drift(trial: Trial) -> float | None:
    early, end = between(trial, _bias(trial), 0.2, 0.4), late(trial, _bias(trial))
    return None if early is None or end is None else abs(end - early)


def _tail_unrest(trial: Trial) -> float | None:
    """None for fewer than two changes. The first fifth is the critic learning the level, not unrest."""
    points = series(trial, "critic/lower_tail_mean")
    start = 0.2 * trial.metrics[-1]["step"] if trial.metrics else 0
    changes = [y - x for (a, x), (b, y) in pairwise(points) if b == a + 1 and a > start]
    return stdev(changes) if len(changes) > 1 else None


def _clean_under_noise(trial: Trial) -> float | None:
    """None for a run whose rewards were never anything but clean."""
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
