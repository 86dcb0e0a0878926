"""Lay a file over the config that it extends, and overrides over both.

Sections merge key by key; everything else is replaced, mappings with keys of the user's own (``data.val_files``) too.
What a layer sets also clears what it inherits and cannot stay beside it: the other side of an either-or, and the
defaults that followed from a key with another value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from dvpo_service.config.algorithm import form_defaults, whitening_default
from dvpo_service.config.pools import kind_default
from dvpo_service.config.rewards import KINDS
from dvpo_service.config.schema import Config
from dvpo_service.config.spelling import is_free_mapping, kind_below
from dvpo_service.errors import ConfigError

Tree = dict[str, Any]
EITHER_OR = (
    ("model.path", "model.warmstart"),
    ("data.val_files", "data.val_fraction"),
    *combinations((f"reward.{key}" for key in (*KINDS, "rewards")), 2),
)
# Keys whose defaults follow from another one: its section and name, and the function that gives them.
FOLLOWERS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Tree]], ...] = (
    ("algorithm", "form", form_defaults),
    ("algorithm", "adv_estimator", whitening_default),
    ("policy.kl", "where", kind_default),
)


def lay(base: Tree, over: Tree) -> Tree:
    """Return ``base``, a config's tree, with the tree of a layer merged over it."""
    merged = _merge(_cleared(base, lambda key: _get(over, key)), over, Config)
    return _followed(base, over, merged)


def lay_overrides(base: Tree, overrides: Mapping[str, Any]) -> Tree:
    """Return ``base`` with the overrides, values by dotted key, in it. A later one wins."""
    merged = _cleared(copy.deepcopy(base), overrides.get)
    over: Tree = {}
    for key, value in overrides.items():
        _put(merged, key, value)
        _put(over, key, value)
    return _followed(base, over, merged)


def _merge(base: Tree, over: Tree, section: Any) -> Tree:
    merged = dict(base)
    for key, value in over.items():
        kind = kind_below(section, key)
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not is_free_mapping(kind):
            merged[key] = _merge(below, value, kind)
        else:
            merged[key] = value
    return merged


def _cleared(base: Tree, given: Callable[[str], Any]) -> Tree:
    """Return ``base`` without the sides of an either-or whose other side a layer gives."""
    base = copy.deepcopy(base)
    for pair in EITHER_OR:
        for side, other in (pair, pair[::-1]):
            if given(side) not in (None, {}) and given(other) in (None, {}):
                _drop(base, other)
    return base


def _followed(base: Tree, over: Tree, merged: Tree) -> Tree:
    """Return ``merged`` without inherited values that were defaults of what the layer has changed.

    A run's own config.yaml gives every key, so that another ``algorithm.form`` over it would change nothing else.
    """
    for section, key, defaults in FOLLOWERS:
        old, here, given = (_get(tree, section) for tree in (base, merged, over))
        if isinstance(old, dict) and isinstance(here, dict) and isinstance(given, dict) and key in given:
            _forget(here, old, given, _or_none(defaults, old), _or_none(defaults, here))
    return merged


def _or_none(defaults: Callable[[Tree], Tree], section: Tree) -> Tree:
    """Return the defaults; none where the user's own estimator is not there, which is told where it is used."""
    try:
        return defaults(section)
    except ConfigError:
        return {}


def _forget(here: Tree, base: Tree, over: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    over = over if isinstance(over, dict) else {}
    for key, default in old.items():
        if isinstance(default, Mapping):
            if isinstance(here.get(key), dict) and isinstance(base.get(key), dict):
                _forget(here[key], base[key], over.get(key), default, new[key])
        elif key not in over and key in base and base[key] == default and new.get(key, default) != default:
            here.pop(key, None)


def _get(tree: Tree, key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _put(tree: Tree, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for part in sections:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _drop(tree: Tree, key: str) -> None:
    section, _, last = key.rpartition(".")
    if isinstance(holder := _get(tree, section), dict):
        holder.pop(last, None)
