"""What the critic's loss is made of. No torch here: a config is read without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LevelKind = Literal["endpoint", "midpoint"]
QrOver = Literal["ensemble", "heads"]
TailTarget = Literal["tail_mean", "pseudo_outcome"]
ShiftOver = Literal["token", "batch"]
Curvature = Literal["pointwise", "block"]

TERMS = ("qr", "risk", "cvar", "gain", "shift", "shape", "curv", "consist")


@dataclass(frozen=True)
class CriticLossSpec:
    """What the loss is made of; LOSSES section 1 has the two presets of it.

    Raises ValueError for a tail outside (0, 1], or weights that are not one finite number >= 0 for each of
    ``TERMS`` (a forgotten weight must not ablate a term).
    """

    alpha: float  # lower tail
    beta: float  # upper tail
    risk_eta: float
    quantile_levels: LevelKind
    huber_unit: bool
    sort_atoms: bool
    qr_over: QrOver
    tail_target: TailTarget
    shift_over: ShiftOver
    curvature: Curvature
    weights: Mapping[str, float]  # per term; 0 = ablated

    def __post_init__(self) -> None:
        for name, fraction in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0.0 < fraction <= 1.0:
                raise ValueError(f"{name} is a fraction in (0, 1], got {fraction}")
        if set(self.weights) != set(TERMS):
            raise ValueError(f"weights must name exactly {TERMS}, got {tuple(self.weights)}")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name} must be finite and >= 0, got {weight}")
