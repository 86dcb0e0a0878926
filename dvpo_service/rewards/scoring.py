"""A reward's name to its scoring function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dvpo_service.errors import ConfigError, describe_error
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
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"reward {name!r}: {hint}use one of {', '.join(BUILT_IN)}, or module:function")
    function = _load(name, module_name, function_name)
    return Scorer(name, function, getattr(function, "extract", exact_match.extract))


def _load(name: str, module_name: str, function_name: str) -> Callable[[str, str], float]:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a person's module may raise anything; it is told, not hidden
        what = describe_error(error, None)
        raise ConfigError(
            f"reward {name!r}: module {module_name!r} cannot be imported ({what}); is it on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(function_name, names, n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else f"; define it in {module.__file__}"
        raise ConfigError(f"reward {name!r}: module {module_name!r} has no function {function_name!r}{hint}")
    if not callable(function):
        raise ConfigError(f"reward {name!r}: it is of type {type(function).__name__}, not a function; name another")
    if not _takes_two(function):
        raise ConfigError(f"reward {name!r}: it must take two arguments, (response, answer); change it")
    return function


def _takes_two(function: Callable) -> bool:
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not tell their signature
        return True
    return True
