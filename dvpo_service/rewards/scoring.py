"""A reward's name to its scoring function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dvpo_service.errors import ConfigError
from dvpo_service.registry import plugins
from dvpo_service.rewards import exact_match

BUILT_IN = ("exact_match", "gsm8k", "math_verify")


class ScoreFn(Protocol):
    """Pure. Returns a finite number, 1 for right and 0 for wrong as a rule; may raise."""

    def __call__(self, response: str, answer: str, /) -> float: ...


@dataclass(frozen=True)
class Scorer:
    """A ``ScoreFn`` with what a majority vote needs: ``extract(response)``, its answer or None."""

    name: str
    score: Callable[[str, str], float]
    extract: Callable[[str], str | None] = exact_match.extract

    def __call__(self, response: str, answer: str, /) -> float:
        return self.score(response, answer)


def resolve(name: str) -> Scorer:
    """A built-in by name, or any ``module:function`` of two arguments, response and answer.

    Such a function may have an attribute ``extract``. Raises ``ConfigError``.
    """
    if name in BUILT_IN:
        module = importlib.import_module(f"dvpo_service.rewards.{name}")
        return Scorer(name, module.score, module.extract)
    if not plugins.is_reference(name):
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"reward {name!r}: {hint}use one of {', '.join(BUILT_IN)}, or module:function")
    function = plugins.load("reward", name)
    plugins.check_arguments("reward", name, function, ("response", "answer"))
    return Scorer(name, function, getattr(function, "extract", exact_match.extract))
