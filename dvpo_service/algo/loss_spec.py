"""The definition of the critic's loss: its terms, weights and settings.

This module does not import torch, so that a config can be read without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dvpo_service.algo.choices import Curvature, LevelKind, QrOver, ShiftOver, TailSpread, TailTarget


@dataclass(frozen=True)
class TermInfo:
    """A loss term's default weight in each form, and whether an ``ablate_*`` switch can remove it."""

    paper: float
    calibrated: float
    has_switch: bool = True


# Every built-in term; ``critic_terms.PER_TOKEN`` has its function. The other terms only shape what quantile regression
# (qr) fits, so qr has no switch.
TERMS: Mapping[str, TermInfo] = {
    "qr": TermInfo(1.0, 1.0, has_switch=False),
    "risk": TermInfo(1.0, 1.0),
    "cvar": TermInfo(1.0, 0.1),
    "gain": TermInfo(1.0, 0.1),
    "shift": TermInfo(1.0, 0.1),
    "shape": TermInfo(1.0, 0.1),
    "curv": TermInfo(1.0, 0.1),
    "consist": TermInfo(1.0, 0.01),
}


@dataclass(frozen=True)
class CriticLossSpec:
    """Everything that defines the critic's loss except the Huber threshold; docs/algorithm.md has its two presets.

    Raises:
      ValueError: when a tail is outside (0, 1], or when the weights are not one finite number >= 0 for each of
        ``TERMS``. (A forgotten weight must not ablate a term.)
    """

    alpha: float  # the lower tail, as a fraction of the atoms
    beta: float  # the upper tail, likewise
    risk_eta: float
    quantile_levels: LevelKind
    huber_unit: bool
    sort_atoms: bool
    qr_over: QrOver
    tail_target: TailTarget  # of Eq. 5 and 6
    tail_spread: TailSpread  # of Eq. 8
    shift_over: ShiftOver
    curvature: Curvature
    weights: Mapping[str, float]  # per term; 0 removes it

    def __post_init__(self) -> None:
        for name, fraction in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0.0 < fraction <= 1.0:
                raise ValueError(f"{name} is a fraction in (0, 1], got {fraction}")
        if set(self.weights) != set(TERMS):
            raise ValueError(f"weights must name exactly {tuple(TERMS)}, got {tuple(self.weights)}")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name} must be finite and >= 0, got {weight}")
