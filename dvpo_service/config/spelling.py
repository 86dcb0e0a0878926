"""Decide by the schema what a scalar means: where a key takes text, ``007`` is text and no number."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dvpo_service.config.plain_yaml import Scalar, read_yaml


def as_meant(tree: Any, kind: Any) -> Any:
    """Return a tree of ``read_yaml`` in plain Python values.

    A ``Scalar`` is its text where ``kind`` takes text and no number, else its value. Null for a mapping with keys of
    the user's own (as ``data.val_files``) is the empty mapping.

    Args:
      kind: the annotation of the value, such as a section's class; None where the schema has no such key.
    """
    if isinstance(tree, Scalar):
        return tree.text if takes_text(kind) else tree.value
    if isinstance(tree, dict):
        return {key: as_meant(value, kind_below(kind, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        inner = next((get_args(k)[0] for k in _members(kind) if get_origin(k) in (list, tuple)), kind)
        return [as_meant(value, inner) for value in tree]
    if tree is None and is_free_mapping(kind):
        return {}
    return tree


def value_of(text: str, kind: Any, where: str) -> Any:
    """Return the value of an override ``key=text``.

    Where the key takes text, all that is typed is text, also ``a: b`` and ``run #3``; only quotes, brackets and null
    are YAML there.

    Raises:
      ConfigError: the text is not YAML.
    """
    text = text.strip()
    is_yaml = text[:1] in ("'", '"', "[", "{") or text in ("", "~", "null")
    if takes_text(kind) and not is_yaml:
        return text
    return as_meant(read_yaml(text, where), kind)


def kind_of(model: type[BaseModel], key: str) -> Any:
    """Return the annotation of a dotted key, or None where the schema has no such key."""
    kind: Any = model
    for part in key.split("."):
        kind = kind_below(kind, part)
    return kind


def is_free_mapping(kind: Any) -> bool:
    """Return whether the value is a mapping with keys of the user's own, and cannot be null."""
    members = list(_members(kind))
    return any(get_origin(k) is dict for k in members) and type(None) not in members


def takes_text(kind: Any) -> bool:
    """Return whether a scalar for this annotation is text: itself, or as the one item of a list or mapping."""
    kinds = {leaf for leaf in _leaves(kind) if leaf is not type(None)}
    return kinds == {str}


def kind_below(kind: Any, key: str) -> Any:
    """Return the annotation of ``key`` in a section or mapping of this annotation, or None."""
    for member in _members(kind):
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(key)
            return field.annotation if field else None
        if get_origin(member) is dict:
            return get_args(member)[1]
    return kind if takes_text(kind) else None


def _members(kind: Any) -> Iterator[Any]:
    """Yield the members of a union, without ``Annotated``."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _members(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _leaves(kind: Any) -> Iterator[Any]:
    """Yield the types of the scalars in an annotation."""
    for member in _members(kind):
        origin = get_origin(member)
        if origin is Literal:
            yield from (type(value) for value in get_args(member))
        elif origin in (list, tuple):
            yield from (leaf for inner in get_args(member) for leaf in _leaves(inner))
        elif origin in (dict, Mapping):
            yield from _leaves(get_args(member)[1])
        else:
            yield member
