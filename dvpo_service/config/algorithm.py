"""``algorithm``: what DVPO computes. Names follow the paper's recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from dvpo_service.algo.critic_loss import TERMS, CriticLossSpec
from dvpo_service.config.base import (
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)

# ``form`` is a preset over these keys; a key that is given wins (LOSSES: two forms, one switch).
FORMS: dict[str, dict[str, Any]] = {
    "paper": dict(
        quantile_levels="endpoint",
        huber_delta=1.0,
        huber_scale="absolute",
        huber_unit=False,
        sort_atoms=True,
        qr_over="ensemble",
        tail_target="tail_mean",
        shift_over="token",
        curvature="pointwise",
        critic_target="gae",
    ),
    "calibrated": dict(
        quantile_levels="midpoint",
        huber_delta=0.05,
        huber_scale="return_sd",
        huber_unit=True,
        sort_atoms=True,
        qr_over="heads",
        tail_target="pseudo_outcome",
        shift_over="batch",
        curvature="block",
        critic_target="mixture",
    ),
}
FORM_WEIGHTS: dict[str, dict[str, float]] = {
    "paper": dict.fromkeys(TERMS, 1.0),
    "calibrated": dict(qr=1.0, risk=1.0, cvar=0.1, gain=0.1, shift=0.1, shape=0.1, curv=0.1, consist=0.01),
}


class LossWeights(Section):
    """Weight of each critic loss term (Eq. 11) and the switches that remove one exactly."""

    qr: NonNegativeFloat
    risk: NonNegativeFloat
    cvar: NonNegativeFloat
    gain: NonNegativeFloat
    shift: NonNegativeFloat
    shape: NonNegativeFloat
    curv: NonNegativeFloat
    consist: NonNegativeFloat
    ablate_risk: bool = False
    ablate_cvar: bool = False
    ablate_gain: bool = False
    ablate_shift: bool = False
    ablate_shape: bool = False
    ablate_curv: bool = False
    ablate_consist: bool = False

    def effective(self) -> dict[str, float]:
        """Weight per term with the ablated ones at 0."""
        return {t: 0.0 if getattr(self, f"ablate_{t}", False) else getattr(self, t) for t in TERMS}


class AlgorithmConfig(Section):
    adv_estimator: Literal["dvpo"] = "dvpo"
    gamma: Probability = 1.0
    lam: Probability = 0.95
    whiten_advantages: bool = True
    bootstrap_truncated: bool = True

    form: Literal["paper", "calibrated"] = "paper"
    n_quantiles: Positive = 200
    n_heads: Positive = 3
    critic_hidden_dim: Positive = 512
    dvpo_alpha: Fraction = 0.1
    dvpo_beta: Fraction = 0.1
    risk_eta: NonNegativeFloat = 1.0
    dvpo_loss_weights: LossWeights

    quantile_levels: Literal["endpoint", "midpoint"]
    huber_delta: PositiveFloat
    huber_scale: Literal["absolute", "return_sd"]
    huber_unit: bool
    sort_atoms: bool
    qr_over: Literal["ensemble", "heads"]
    tail_target: Literal["tail_mean", "pseudo_outcome"]
    shift_over: Literal["token", "batch"]
    curvature: Literal["pointwise", "block"]
    critic_target: Literal["gae", "mixture"]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_form(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        form = given.get("form", "paper")
        if form not in FORMS:
            form = "paper"  # fill in the rest, so that the wrong form is the one error reported
        weights = given.get("dvpo_loss_weights", {})
        if isinstance(weights, dict):
            weights = FORM_WEIGHTS[form] | weights
        return FORMS[form] | given | {"dvpo_loss_weights": weights}

    def critic_loss_spec(self) -> CriticLossSpec:
        return CriticLossSpec(
            alpha=self.dvpo_alpha,
            beta=self.dvpo_beta,
            risk_eta=self.risk_eta,
            quantile_levels=self.quantile_levels,
            huber_unit=self.huber_unit,
            sort_atoms=self.sort_atoms,
            qr_over=self.qr_over,
            tail_target=self.tail_target,
            shift_over=self.shift_over,
            curvature=self.curvature,
            weights=self.dvpo_loss_weights.effective(),
        )
