"""The user's own terms of the critic's loss: ``algorithm.critic_terms``, a mapping of ``module:name`` to weights."""

from __future__ import annotations

from collections.abc import Mapping

from dvpo_service.algo.critic_loss import OwnTerm
from dvpo_service.algo.loss_spec import TERMS
from dvpo_service.errors import ConfigError
from dvpo_service.registry import plugins

KEY = "algorithm.critic_terms"


def load_terms(references: Mapping[str, float]) -> dict[str, OwnTerm]:
    """Return the terms by name. The name is the function's; the term is reported as ``critic/loss/<name>``.

    Args:
      references: the weight of each term, by ``module:function``.

    Raises:
      ConfigError: when a function cannot be loaded or takes other arguments, or a name is in use already.
    """
    terms: dict[str, OwnTerm] = {}
    for reference, weight in references.items():
        function = plugins.load(KEY, reference)
        plugins.check_arguments(KEY, reference, function, ("heads", "targets", "levels"))
        name = reference.partition(":")[2]
        if name in terms or name in TERMS:
            raise ConfigError(f"{KEY} {reference!r}: there is a term named {name!r} already; rename the function")
        terms[name] = OwnTerm(function, weight)
    return terms
