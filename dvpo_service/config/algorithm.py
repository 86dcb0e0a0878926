"""``algorithm``: what DVPO computes. Names follow the paper's recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dvpo_service.algo.loss_spec import (
    TERMS,
    CriticLossSpec,
    Curvature,
    LevelKind,
    QrOver,
    ShiftOver,
    TailTarget,
)
from dvpo_service.config.base import (
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)

Estimator = Literal["dvpo", "gae", "robust_gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus"]
WITH_CRITIC = frozenset({"dvpo", "gae", "robust_gae"})
# A group's outcomes are centred already; the others' advantages share a scale over the batch.
WHITENED = WITH_CRITIC | {"reinforce_plus_plus"}


def _tail(fraction: float) -> float:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            "a tail is a share of the quantiles, more than 0 and at most 1; to remove a tail's term, "
            "set algorithm.dvpo_loss_weights.ablate_cvar or ablate_gain to true"
        )
    return fraction


Tail = Annotated[float, AfterValidator(_tail)]

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
    """``adv_estimator`` chooses where advantages come from; docs/algorithm.md has each of them.

    ``lam`` is GAE's trace for the policy, ``critic_lam`` that of the critic's targets (the same when
    absent); ``length_adaptive_alpha`` replaces ``lam`` by 1 - 1/(alpha x length). ``advantage`` puts risk
    into DVPO's advantage. ``robust_rho`` is robust_gae's contamination per token."""

    adv_estimator: Estimator = "dvpo"
    gamma: Probability = 1.0
    lam: Probability = 0.95
    critic_lam: Probability | None = None
    length_adaptive_alpha: PositiveFloat | None = None
    whiten_advantages: bool
    bootstrap_truncated: bool = True
    robust_rho: Probability = 0.01

    advantage: Literal["mean", "cvar", "entropic"] = "mean"
    advantage_alpha: Fraction = 1.0
    advantage_beta: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    head_trust: NonNegativeFloat = 0.0

    form: Literal["paper", "calibrated"] = "paper"
    n_quantiles: Positive = 200
    n_heads: Positive = 3
    critic_hidden_dim: Positive = 512
    dvpo_alpha: Tail = 0.1
    dvpo_beta: Tail = 0.1
    risk_eta: NonNegativeFloat = 1.0
    dvpo_loss_weights: LossWeights

    quantile_levels: LevelKind
    huber_delta: PositiveFloat
    huber_scale: Literal["absolute", "return_sd"]
    huber_unit: bool
    sort_atoms: bool
    qr_over: QrOver
    tail_target: TailTarget
    shift_over: ShiftOver
    curvature: Curvature
    critic_target: Literal["gae", "mixture"]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_form(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        form = str(given.get("form", "paper"))  # whatever was given: it is checked later
        if form not in FORMS:
            form = "paper"  # fill in the rest, so that the wrong form is the one error reported
        weights = given.get("dvpo_loss_weights", {})
        if isinstance(weights, dict):
            weights = FORM_WEIGHTS[form] | weights
        whiten = {"whiten_advantages": str(given.get("adv_estimator", "dvpo")) in WHITENED}
        return FORMS[form] | whiten | given | {"dvpo_loss_weights": weights}

    @model_validator(mode="after")
    def _a_distribution(self) -> Self:
        if self.dvpo_alpha + self.dvpo_beta > 1:
            raise ValueError(
                f"dvpo_alpha + dvpo_beta = {self.dvpo_alpha + self.dvpo_beta:g} is more than 1: the tails would "
                "overlap, and the terms of the two pull the shared quantiles in opposite directions"
            )
        if self.n_quantiles == 1 and self.quantile_levels == "endpoint":
            raise ValueError(
                "one quantile at level 1/1 is an upper bound that only rises; with n_quantiles=1 use "
                "quantile_levels=midpoint (the median)"
            )
        return self

    @property
    def has_critic(self) -> bool:
        """Whether the estimator learns values; the others need no critic pool."""
        return self.adv_estimator in WITH_CRITIC

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
