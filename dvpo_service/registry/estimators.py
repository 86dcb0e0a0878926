"""Every advantage estimator with its properties: ``algorithm.adv_estimator``.

Whatever depends on the kind of estimator asks for a property here; nothing else compares names. A built-in is its
own file and a row of ``ESTIMATORS``. This module imports no torch: a config is checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dvpo_service.errors import ConfigError
from dvpo_service.registry import plugins

KEY = "algorithm.adv_estimator"


@dataclass(frozen=True)
class EstimatorTraits:
    """What the rest of the service has to know of an estimator.

    Attributes:
      needs_critic: a critic pool learns values, and the estimator is a ``CriticObjective``; otherwise it is a function
        of the rollouts (see ``base.GroupAdvantage``).
      distributional: the critic predicts a distribution, so there are atoms, quantile metrics and pictures.
      needs_groups: it compares the samples of a prompt, so ``rollout.n`` must be 2 or more.
      whitens: the default of ``algorithm.whiten_advantages``.
      pessimistic: its values are below the returns on purpose.
    """

    needs_critic: bool = False
    distributional: bool = False
    needs_groups: bool = False
    whitens: bool = False
    pessimistic: bool = False


@dataclass(frozen=True)
class Entry:
    """Where a built-in estimator is (``module:name``), and its properties."""

    target: str
    traits: EstimatorTraits


def _group(name: str, **traits: bool) -> Entry:
    return Entry(f"dvpo_service.estimators.group:{name}", EstimatorTraits(**traits))


ESTIMATORS: Mapping[str, Entry] = {
    "dvpo": Entry(
        "dvpo_service.estimators.dvpo:DvpoObjective",
        EstimatorTraits(needs_critic=True, distributional=True, whitens=True),
    ),
    "gae": Entry(
        "dvpo_service.estimators.gae:GaeObjective",
        EstimatorTraits(needs_critic=True, whitens=True),
    ),
    "robust_gae": Entry(
        "dvpo_service.estimators.gae:RobustGaeObjective",
        EstimatorTraits(needs_critic=True, whitens=True, pessimistic=True),
    ),
    # A group's outcomes are centred already; REINFORCE++ compares over the whole batch.
    "grpo": _group("grpo_advantages", needs_groups=True),
    "dr_grpo": _group("dr_grpo_advantages", needs_groups=True),
    "rloo": _group("rloo_advantages", needs_groups=True),
    "reinforce_plus_plus": _group("reinforce_plus_plus_advantages", whitens=True),
    # The group's mean as baseline, then whitened over the batch (arXiv 2501.03262).
    "reinforce_plus_plus_baseline": _group("dr_grpo_advantages", needs_groups=True, whitens=True),
}


def check_name(name: str) -> str:
    """Return ``name`` where it is a built-in estimator or ``module:name``; raise ValueError otherwise."""
    return plugins.check_name(KEY, name, ESTIMATORS)


def traits_of(name: str) -> EstimatorTraits:
    """Return the properties of a built-in, or those that the user's own estimator declares as ``traits``.

    Raises:
      ConfigError: the user's object cannot be imported, or declares none.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name].traits
    traits = getattr(plugins.load(KEY, name), "traits", None)
    if not isinstance(traits, EstimatorTraits):
        raise ConfigError(
            f"{KEY} {name!r}: it has no `traits`; decorate the function or class with "
            "@dvpo_service.estimators.base.estimator(needs_critic=..., needs_groups=...)"
        )
    return traits


@cache
def load(name: str) -> Any:
    """Return the estimator's class (a ``CriticObjective``) or function (a ``GroupAdvantage``). Raises ConfigError."""
    return plugins.load(KEY, ESTIMATORS[name].target if name in ESTIMATORS else name)
