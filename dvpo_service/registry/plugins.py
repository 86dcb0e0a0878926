"""``module:name`` in a config: load an object of the user's own, or fail with one clear line.

Every key that names a built-in part also takes such a reference; docs/extending.md has an example of each.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection
from typing import Any

from dvpo_service.errors import ConfigError, describe_error

_WORDS = {1: "one", 2: "two", 3: "three", 5: "five"}


def is_reference(name: str) -> bool:
    """Return whether ``name`` is written as ``module:name`` rather than as a built-in's name."""
    module, colon, attribute = name.partition(":")
    return bool(module and colon and attribute)


def load(key: str, reference: str) -> Any:
    """Import and return the object that ``reference`` (``module:name``) names.

    Args:
      key: the config key that holds the reference (``policy.loss``), for the message.

    Raises:
      ConfigError: the module cannot be imported, has no such name, or the object cannot be called.
    """
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything, and the message must say what
        raise ConfigError(
            f"{key} {reference!r}: module {module_name!r} cannot be imported ({describe_error(error, None)}); "
            "is it on PYTHONPATH?"
        ) from error
    target = getattr(module, name, None)
    if target is None:
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else f"; define it in {module.__file__}"
        raise ConfigError(f"{key} {reference!r}: module {module_name!r} has no function {name!r}{hint}")
    if not callable(target):
        raise ConfigError(
            f"{key} {reference!r}: it is of type {type(target).__name__}, not a function or class; name another"
        )
    return target


def check_arguments(key: str, reference: str, function: Callable[..., Any], arguments: Collection[str]) -> None:
    """Raise ConfigError unless ``function`` can be called with as many positional arguments as ``arguments`` names."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        count = f"{_WORDS[len(arguments)]} argument{'s' if len(arguments) > 1 else ''}"
        raise ConfigError(
            f"{key} {reference!r}: it must take {count}, ({', '.join(arguments)}); change it ({error})"
        ) from error
    except ValueError:  # some functions written in C have no signature to read
        return


def check_name(key: str, name: str, built_in: Collection[str]) -> str:
    """Return ``name`` if it is a built-in or a reference.

    Raises:
      ValueError: it is neither; the message names the nearest built-in.
    """
    if name in built_in or is_reference(name):
        return name
    near = difflib.get_close_matches(name, built_in, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{hint}use one of {', '.join(built_in)}, or module:name ({key})")
