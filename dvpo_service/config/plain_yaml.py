"""Read YAML so that nothing that was typed is lost or changed: keys are text, and numbers remember their spelling.

Numbers, ``true`` and ``null`` are read as YAML 1.2 reads them: ``1e-3`` is a number, ``010`` is ten, while ``on``,
``1:30`` and ``2024-11-27`` are text. A key that stands twice in a mapping is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from dvpo_service.errors import ConfigError, one_line

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
# YAML 1.2's core schema, section 10.3.2. The first that matches a plain scalar gives its kind.
_KINDS = (
    ("merge", r"<<"),
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", _FLOAT),
)


@dataclass(frozen=True)
class Scalar:
    """A number or truth value, and the text that it was written as."""

    value: bool | int | float
    text: str


class NotYaml(ConfigError):
    """A text that is not YAML."""


class _Refused(yaml.MarkedYAMLError):
    """YAML that has no meaning here, such as a key that stands twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's kinds of scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own name and form

    def compose_node(self, parent: Any, index: Any) -> Any:
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias of a node that is still being read
            raise _Refused(problem="an alias stands for what holds it", problem_mark=node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(problem="a key must be text", problem_mark=key.start_mark)
            if key.tag == _TAG + "merge":
                continue
            key.tag = _TAG + "str"
            if key.value in first:
                where = first[key.value]
                raise _Refused(
                    problem=f"{key.value!r} is given twice, first in line {where.line + 1}; keep one of them",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Scalar:
    text = str(node.value)
    kind = node.tag.removeprefix(_TAG)
    if kind == "bool":
        return Scalar(text.lower() == "true", text)
    if kind == "int":
        return Scalar(int(text, 0) if text[:2] in ("0x", "0o") else int(text), text)
    return Scalar(float(text.lower().replace(".inf", "inf").replace(".nan", "nan")), text)


for _kind, _pattern in _KINDS:
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})$"), None)
for _kind in ("bool", "int", "float"):
    _Loader.add_constructor(_TAG + _kind, _number)


def read_yaml(text: str, where: str) -> Any:
    """Return the tree of mappings, lists, text, None and ``Scalar`` that the text holds.

    Args:
      where: what is read, named by errors.

    Raises:
      NotYaml: the text is not YAML, or a number in it is too long to read.
      ConfigError: a key stands twice, or an alias stands for what holds it.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _Refused as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{where}:{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise NotYaml(f"{where}: not valid YAML: {one_line(error, None)}") from error
