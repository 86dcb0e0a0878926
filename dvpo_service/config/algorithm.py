"""``algorithm``: how advantages and the critic's loss are computed. Keys have the paper's names (arXiv 2512.03847)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, create_model, model_validator

from dvpo_service.algo.choices import (
    AdvantageKind,
    ClipScale,
    CriticTarget,
    Curvature,
    HuberScale,
    LevelKind,
    QrOver,
    ShiftOver,
    TailSpread,
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

# ``form`` sets the defaults of these keys; a value that the config gives overrides its default.
FORMS: dict[str, dict[str, Any]] = {
    "paper": dict(
        quantile_levels="endpoint",
        huber_delta=1.0,
        huber_scale="absolute",
        huber_unit=False,
        sort_atoms=True,
        qr_over="ensemble",
        tail_target="tail_mean",
        tail_spread="variance",
        shift_over="token",
        curvature="pointwise",
        critic_target="gae",
        advantage="mean",
    ),
    "calibrated": dict(
        quantile_levels="midpoint",
        huber_delta=0.05,
        huber_scale="return_sd",
        huber_unit=True,
        sort_atoms=True,
        qr_over="heads",
        tail_target="pseudo_outcome",
        tail_spread="variance",
        shift_over="batch",
        curvature="block",
        critic_target="mixture",
        advantage="mean",
    ),
}
# As calibrated, with nothing that a few wild rewards can rule.
FORMS["robust"] = FORMS["calibrated"] | dict(
    huber_scale="return_width",
    tail_target="bounded",
    tail_spread="bounded",
    shift_over="batch_middle",
    advantage="huber",
)
DEFAULT_FORM: Literal["robust"] = "robust"  # docs/noise-study.md has the evidence
FORM_WEIGHTS: dict[str, dict[str, float]] = {
    "paper": {name: term.paper for name, term in TERMS.items()},
    "calibrated": {name: term.calibrated for name, term in TERMS.items()},
    "robust": {name: term.calibrated for name, term in TERMS.items()},
}


class _LossWeights(Section):
    """Weight of each critic loss term (Eq. 11), and ``ablate_<term>`` switches; a removed term has no effect at all.

    The fields are made from ``loss_spec.TERMS``.
    """

    def effective(self) -> dict[str, float]:
        """Return the weight of every term; ablated terms have weight 0."""
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


def form_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the keys that follow ``form``; those of the default form for an unknown one."""
    form = given.get("form", DEFAULT_FORM)
    if not isinstance(form, str) or form not in FORMS:
        form = DEFAULT_FORM  # fill in the other keys, so that the wrong form is the one error reported
    return FORMS[form] | {"dvpo_loss_weights": FORM_WEIGHTS[form]}


def whitening_default(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of ``whiten_advantages``; False for an unknown name, which is reported elsewhere.

    Raises:
      ConfigError: an estimator of the user's own cannot be loaded.
    """
    estimator = given.get("adv_estimator", "dvpo")
    try:
        return {"whiten_advantages": estimators.traits_of(estimators.check_name(str(estimator))).whitens}
    except ValueError:
        return {"whiten_advantages": False}


class AlgorithmConfig(Section):
    """The advantage estimator and the critic's loss; docs/algorithm.md explains every key.

    Attributes:
      adv_estimator: a built-in estimator, or ``module:name`` of your own (docs/extending.md).
      critic_terms: loss terms of your own, ``module:name`` to weight.
      lam: GAE's trace for the policy's advantages.
      critic_lam: the trace of the critic's targets; ``lam`` when absent.
      length_adaptive_alpha: replaces ``lam`` by 1 - 1/(alpha x length).
      bootstrap_truncated: the critic's own value follows a response that was cut at the length limit. Only for rewards
        that are still to come then: an outcome reward of a cut response is its whole return.
      max_advantage: bound on the absolute advantage of a token, before whitening; null for none. Where the rewards'
        distribution is skewed it moves the mean of the advantages away from 0, which ``advantage: huber`` does not.
      advantage: how DVPO's advantage compares the distributions of target and prediction: by their means, pair by
        pair with bounded differences (huber), or by a risk measure (cvar, entropic).
      advantage_clip: huber's bound on the difference of a pair, in units of ``advantage_clip_scale``. 1.35 widths are
        the interquartile range of the returns: 1 for 0/1 rewards.
      robust_rho: contamination per token of robust_gae.
      form: the preset for the keys in ``FORMS`` and for the loss weights.
    """

    adv_estimator: Annotated[str, AfterValidator(_is_estimator)] = "dvpo"
    gamma: Probability = 1.0
    lam: Probability = 0.95
    critic_lam: Probability | None = None
    length_adaptive_alpha: PositiveFloat | None = None
    whiten_advantages: bool
    max_advantage: PositiveFloat | None = None
    bootstrap_truncated: bool = False
    robust_rho: Probability = 0.01

    advantage: AdvantageKind
    advantage_clip: PositiveFloat = 1.35
    advantage_clip_scale: ClipScale = "return_width"
    advantage_alpha: Fraction = 1.0
    advantage_beta: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    head_trust: NonNegativeFloat = 0.0

    form: Literal["paper", "calibrated", "robust"] = DEFAULT_FORM
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
    tail_spread: TailSpread
    shift_over: ShiftOver
    curvature: Curvature
    critic_target: CriticTarget

    @model_validator(mode="before")
    @classmethod
    def _fill_from_form(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # The config of a run holds the value. An estimator of the user's own need not be there to serve or export it.
        whitening = {} if "whiten_advantages" in given else whitening_default(given)
        filled = form_defaults(given) | whitening | given
        if isinstance(given.get("dvpo_loss_weights"), dict):
            filled["dvpo_loss_weights"] = form_defaults(given)["dvpo_loss_weights"] | given["dvpo_loss_weights"]
        return filled

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
        """Properties of the chosen estimator."""
        return estimators.traits_of(self.adv_estimator)

    @property
    def has_critic(self) -> bool:
        """Whether the estimator learns values, and so needs a critic pool."""
        return self.traits.needs_critic

    @property
    def advantage_is_mean(self) -> bool:
        """Whether the advantage compares means only, by name or by a parameter's neutral value."""
        neutral = {"cvar": self.advantage_alpha == 1, "entropic": self.advantage_beta == 0, "huber": False}
        return neutral.get(self.advantage, True)

    def critic_loss_spec(self) -> CriticLossSpec:
        """Return the settings of the critic's loss, in the form that ``dvpo_service.algo`` takes."""
        return CriticLossSpec(
            alpha=self.dvpo_alpha,
            beta=self.dvpo_beta,
            risk_eta=self.risk_eta,
            quantile_levels=self.quantile_levels,
            huber_unit=self.huber_unit,
            sort_atoms=self.sort_atoms,
            qr_over=self.qr_over,
            tail_target=self.tail_target,
            tail_spread=self.tail_spread,
            shift_over=self.shift_over,
            curvature=self.curvature,
            weights=self.dvpo_loss_weights.effective(),
        )
