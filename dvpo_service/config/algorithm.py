"""``algorithm``: what DVPO computes. Names follow the paper's recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, create_model, model_validator

from dvpo_service.algo.choices import (
    AdvantageKind,
    CriticTarget,
    Curvature,
    HuberScale,
    LevelKind,
    QrOver,
    ShiftOver,
    TailTarget,
)
from dvpo_service.algo.loss_spec import TERMS, CriticLossSpec
from dvpo_service.config.base import (
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Probability,
    Section,
)
from dvpo_service.registry import estimators
from dvpo_service.registry.estimators import EstimatorTraits
from dvpo_service.registry.plugins import is_reference


def _tail(fraction: float) -> float:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            "a tail is a share of the quantiles, more than 0 and at most 1; to remove a tail's term, "
            "set algorithm.dvpo_loss_weights.ablate_cvar or ablate_gain to true"
        )
    return fraction


Tail = Annotated[float, AfterValidator(_tail)]

# ``form`` is a preset over these keys; a key that is given wins.
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
    "paper": {name: term.paper for name, term in TERMS.items()},
    "calibrated": {name: term.calibrated for name, term in TERMS.items()},
}


class _LossWeights(Section):
    """Weight of each critic loss term (Eq. 11), and the ``ablate_*`` switches that remove one exactly.

    The fields are made from ``loss_spec.TERMS``.
    """

    def effective(self) -> dict[str, float]:
        """Return the weight of every term, with the ablated ones at 0."""
        return {t: 0.0 if getattr(self, f"ablate_{t}", False) else getattr(self, t) for t in TERMS}


if TYPE_CHECKING:
    LossWeights = _LossWeights
else:
    _fields = {name: (NonNegativeFloat, ...) for name in TERMS}
    _fields |= {f"ablate_{name}": (bool, False) for name, term in TERMS.items() if term.has_switch}
    LossWeights = create_model("LossWeights", __base__=_LossWeights, __module__=__name__, **_fields)


def _is_estimator(name: str) -> str:
    return estimators.check_name(name)


def _are_references(terms: dict[str, float]) -> dict[str, float]:
    for reference in terms:
        if not is_reference(reference):
            raise ValueError(f"{reference!r}: write each term as module:name, with its weight")
    return terms


def _whitening(estimator: object) -> dict[str, bool]:
    """Return the default of ``whiten_advantages``; for a name that is none, any: the name is the error to report."""
    try:
        return {"whiten_advantages": estimators.traits_of(estimators.check_name(str(estimator))).whitens}
    except ValueError:
        return {"whiten_advantages": False}


class AlgorithmConfig(Section):
    """``adv_estimator`` chooses where advantages come from; docs/algorithm.md has each of them. It is a built-in's name
    or ``module:name`` of your own (docs/extending.md), as are the keys of ``critic_terms``, whose values are weights.

    ``lam`` is GAE's trace for the policy, ``critic_lam`` that of the critic's targets (the same when
    absent); ``length_adaptive_alpha`` replaces ``lam`` by 1 - 1/(alpha x length). ``advantage`` puts risk
    into DVPO's advantage. ``robust_rho`` is robust_gae's contamination per token."""

    adv_estimator: Annotated[str, AfterValidator(_is_estimator)] = "dvpo"
    gamma: Probability = 1.0
    lam: Probability = 0.95
    critic_lam: Probability | None = None
    length_adaptive_alpha: PositiveFloat | None = None
    whiten_advantages: bool
    bootstrap_truncated: bool = True
    robust_rho: Probability = 0.01

    advantage: AdvantageKind = "mean"
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
    critic_terms: Annotated[dict[str, NonNegativeFloat], AfterValidator(_are_references)] = Field(default_factory=dict)

    quantile_levels: LevelKind
    huber_delta: PositiveFloat
    huber_scale: HuberScale
    huber_unit: bool
    sort_atoms: bool
    qr_over: QrOver
    tail_target: TailTarget
    shift_over: ShiftOver
    curvature: Curvature
    critic_target: CriticTarget

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
        return FORMS[form] | _whitening(given.get("adv_estimator", "dvpo")) | given | {"dvpo_loss_weights": weights}

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

    @model_validator(mode="after")
    def _terms_have_a_distribution(self) -> Self:
        if self.critic_terms and not self.traits.distributional:
            raise ValueError(f"critic_terms: adv_estimator={self.adv_estimator} has no distributional critic")
        return self

    @property
    def traits(self) -> EstimatorTraits:
        """The properties of the estimator."""
        return estimators.traits_of(self.adv_estimator)

    @property
    def has_critic(self) -> bool:
        """Whether the estimator learns values; the others need no critic pool."""
        return self.traits.needs_critic

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
