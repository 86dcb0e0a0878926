"""Grids as data: the arms that a sweep compares, and the reference arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dvpo_service.algo.loss_spec import TERMS
from dvpo_service.registry.estimators import ESTIMATORS

WEIGHTS = "algorithm.dvpo_loss_weights"
ABLATED = tuple(name for name, term in TERMS.items() if term.has_switch)


@dataclass(frozen=True)
class Arm:
    """One setting under test.

    Attributes:
      overrides: dotted config keys and their values.
      removes: the loss term that the arm leaves out, if it leaves out exactly one.
    """

    name: str
    overrides: Mapping[str, Any]
    removes: str | None = None


@dataclass(frozen=True)
class Grid:
    """What a sweep runs: a list of arms, or a space to draw settings from.

    Attributes:
      reference: the arm that all others are compared with; None if no arm is a natural reference.
      space: in place of arms, one Tune sampler for each dotted config key, as in ``{"loguniform": [1e-5, 1e-3]}``.
      num_samples: number of settings to draw from the space.
      metric: what ``search`` and ``scheduler`` maximise.
      search: how the settings are drawn.
      scheduler: "asha" stops a trial early if its ``metric`` lags behind.
    """

    name: str
    title: str
    arms: tuple[Arm, ...] = ()
    reference: str | None = None
    space: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_samples: int = 1
    metric: str = "accuracy"
    search: Literal["random", "optuna"] = "random"
    scheduler: Literal["none", "asha"] = "none"


def _off(*terms: str) -> dict[str, Any]:
    return {f"{WEIGHTS}.ablate_{term}": True for term in terms}


def _leave_one_out() -> Grid:
    full = Arm("full", {})
    without = tuple(Arm(f"no-{term}", _off(term), removes=term) for term in ABLATED)
    return Grid(
        "leave-one-out",
        "Each loss term removed from full DVPO, and quantile regression alone",
        (full, *without, Arm("qr-only", _off(*ABLATED))),
        reference="full",
    )


def _ladder() -> Grid:
    """Return the paper's cumulative ladder: each arm adds terms to the arm before."""
    added = (
        ("core", ("risk",)),
        ("+consistency", ("consist",)),
        ("+tails", ("cvar", "gain")),
        ("+shift", ("shift",)),
        ("+shape+curvature", ("shape", "curv")),
    )
    arms = []
    on = set[str]()
    for name, terms in added:
        on |= set(terms)
        arms.append(Arm(name, _off(*(t for t in ABLATED if t not in on))))
    return Grid("ladder", "The paper's cumulative ladder of terms", tuple(arms), reference="core")


def _values(name: str, title: str, key: str, values: tuple[Any, ...], reference: Any) -> Grid:
    arms = tuple(Arm(f"{key.rpartition('.')[2]}={v}", {key: v}) for v in values)
    return Grid(name, title, arms, reference=f"{key.rpartition('.')[2]}={reference}")


def _noise() -> Grid:
    levels = (0.0, 0.1, 0.2, 0.3, 0.4)
    arms = tuple(
        Arm(f"{estimator}-flip={p}", {"algorithm.adv_estimator": estimator, "reward.noise": {"kind": "flip", "p": p}})
        for p in levels
        for estimator in ("dvpo", "gae")
    )
    return Grid("noise", "DVPO and PPO as more rewards are flipped", arms, reference="gae-flip=0.0")


def _noise_study() -> Grid:
    """Return the methods of docs/noise-study.md; the noise is in the overrides of the command line."""
    estimator = "algorithm.adv_estimator"
    methods: dict[str, dict[str, Any]] = {
        "dvpo": {},
        "dvpo-mean": {"algorithm.advantage": "mean"},
        "ppo": {estimator: "gae"},
        "ppo-max-advantage-1": {estimator: "gae", "algorithm.max_advantage": 1.0},
        "ppo-reward-in-0-1": {estimator: "gae", "reward.clip": [0.0, 1.0]},
        "grpo": {estimator: "grpo"},
    }
    arms = tuple(Arm(name, overrides) for name, overrides in methods.items())
    return Grid("noise-study", "DVPO and its rivals under one noise", arms, reference="dvpo")


def _risk() -> Grid:
    arms = (
        Arm("mean", {"algorithm.advantage": "mean"}),
        Arm("cvar-0.25", {"algorithm.advantage": "cvar", "algorithm.advantage_alpha": 0.25}),
        Arm("cvar-0.5", {"algorithm.advantage": "cvar", "algorithm.advantage_alpha": 0.5}),
        Arm("entropic-averse", {"algorithm.advantage": "entropic", "algorithm.advantage_beta": -2.0}),
        Arm("entropic-seeking", {"algorithm.advantage": "entropic", "algorithm.advantage_beta": 2.0}),
        Arm("head-trust", {"algorithm.head_trust": 1.0}),
    )
    return Grid("risk", "Risk in the advantage", arms, reference="mean")


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        _leave_one_out(),
        _ladder(),
        _values(
            "forms",
            "The paper's form against the calibrated and the robust one",
            "algorithm.form",
            ("paper", "calibrated", "robust"),
            "paper",
        ),
        _values("quantiles", "Quantiles per head", "algorithm.n_quantiles", (50, 100, 200, 500), 200),
        _values("heads", "Heads of the critic", "algorithm.n_heads", (1, 3, 5), 3),
        _values("risk-eta", "Tilt of the risk-weighted loss", "algorithm.risk_eta", (0.0, 0.5, 1.0, 2.0, 4.0), 1.0),
        _risk(),
        _noise(),
        _noise_study(),
        _values("estimators", "DVPO against its baselines", "algorithm.adv_estimator", tuple(ESTIMATORS), "gae"),
    )
}
