"""Find the scoring function that a reward's name stands for."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from dvpo_service.errors import ConfigError
from dvpo_service.registry import plugins
from dvpo_service.rewards import exact_match

BUILT_IN = ("exact_match", "gsm8k", "math_verify", "share_right")


class ScoreFn(Protocol):
    """A pure function that returns a finite number, usually 1 for right and 0 for wrong. It may raise."""

    def __call__(self, response: str, answer: str, /) -> float: ...


@dataclass(frozen=True)
class Scorer:
    """A ``ScoreFn``, with ``extract(response)`` for a majority vote: it returns the response's answer, or None."""

    name: str
    score: Callable[[str, str], float]
    extract: Callable[[str], str | None] = exact_match.extract

    def __call__(self, response: str, answer: str, /) -> float:
        return self.score(response, answer)


class NotANumber(ValueError):
    """A scoring function returned something that is no finite number."""


def finite_number(value: object) -> float:
    """Return what a scoring function returned as a float: a number of Python, or a numpy or torch one of no axes.

    Raises:
      NotANumber: it is something else, infinite or NaN.
    """
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if isinstance(number, Real) and math.isfinite(number):
        return float(number)
    raise NotANumber(f"the scoring function returned {number!r:.80}, not a finite number")


def resolve(name: str) -> Scorer:
    """Return the scorer that ``name`` stands for.

    Args:
      name: a built-in, or any ``module:function`` of two arguments, response and answer. The function may have an
        attribute ``extract``.

    Raises:
      ConfigError: there is no such built-in, or the function cannot be loaded.
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
