"""How a reward function wants to be called, read once from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dvpo_service.errors import ConfigError

# What a function of one response, or of a batch, can ask for by name. Any other name is a column of the row.
ONE = ("response", "answer", "row", "prompt", "messages", "source")
BATCH = ("responses", "completions", "answers", "answer", "rows", "prompts", "messages", "sources")
SHAPES = (
    f"(response, answer), (response, answer, row), any of {', '.join(ONE)} and columns by name with `response` among "
    "them, or a batch by name with `responses` among them (docs/rewards.md)"
)


@dataclass(frozen=True)
class Work:
    """The responses to one prompt, with what a reward may need to score them.

    Attributes:
      responses: the sampled texts.
      answer: the prompt's reference answer.
      seeds: one per response, for the noise.
      source: the dataset that the prompt is from; it selects the noise, and which of several rewards score it.
      row: the row's columns (``types.Prompt``).
      messages: the prompt, as a chat.
    """

    responses: list[str]
    answer: Any
    seeds: list[int]
    source: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] = ()

    def one(self, response: str) -> dict[str, Any]:
        """Return what a function of one response can ask for; every column, and over those the names of ``ONE``."""
        return {
            **self.row,
            "response": response,
            "answer": self.answer,
            "row": dict(self.row),
            "prompt": self.messages[-1]["content"] if self.messages else "",
            "messages": list(self.messages),
            "source": self.source,
        }

    def batch(self) -> dict[str, list[Any]]:
        """Return what a function of a batch can ask for: lists with an entry per response."""
        each = [self.one(response) for response in self.responses]
        columns = {name: [one[name] for one in each] for name in self.row}
        plural = {f"{name}s": [one[name] for one in each] for name in ("response", "answer", "row", "prompt", "source")}
        same = {name: [one[name] for one in each] for name in ("answer", "messages")}
        return columns | same | plural | {"completions": plural["responses"]}


@dataclass(frozen=True)
class Convention:
    """How to call a function.

    Attributes:
      positional: the names of what it gets by position, in order.
      keywords: of what it gets by keyword.
      optional: names that have a default, and are given where the row has such a column.
      rest: whether it takes any keyword, and so gets all there is.
      batch: whether it takes lists and returns one.
    """

    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rest: bool = False
    batch: bool = False

    @property
    def known(self) -> tuple[str, ...]:
        """The names that are no columns."""
        return BATCH if self.batch else ONE

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns without which it cannot be called."""
        return tuple(name for name in (*self.positional, *self.keywords) if name not in self.known)

    def arguments(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments, by position and by keyword.

        Raises:
          KeyError: the row lacks a column.
        """
        named = {name: _column(values, name) for name in self.keywords}
        if self.rest:
            named = {k: v for k, v in values.items() if k not in self.positional} | named
        named |= {name: values[name] for name in self.optional if name in values}
        return [_column(values, name) for name in self.positional], named


PLAIN = Convention(("response", "answer"))


def _column(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise KeyError(f"the row has no column {name!r}")
    return values[name]


def convention_of(reward: str, function: Callable[..., Any]) -> Convention:
    """Return how to call ``function``.

    Args:
      reward: its name, for the message.

    Raises:
      ConfigError: its arguments are none of ``SHAPES``.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature to read
        return PLAIN
    parameters = list(signature.parameters.values())
    names = {p.name for p in parameters}
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if names & {"responses", "completions"}:
        return _by_name(parameters, rest, batch=True)
    if "response" in names or (rest and len(parameters) == 1):
        return _by_name(parameters, rest, batch=False)
    found = _by_place(parameters)
    if found is None:
        raise ConfigError(f"reward {reward!r}: its arguments {signature} fit nothing; take {SHAPES}")
    return found


def _by_name(parameters: Sequence[inspect.Parameter], rest: bool, *, batch: bool) -> Convention:
    single = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    by_place = [p.name for p in single if p.kind is p.POSITIONAL_ONLY]
    others = [p for p in single if p.kind is not p.POSITIONAL_ONLY]
    return Convention(
        positional=tuple(by_place),
        keywords=tuple(p.name for p in others if p.default is p.empty),
        optional=tuple(p.name for p in others if p.default is not p.empty),
        rest=rest,
        batch=batch,
    )


def _by_place(parameters: Sequence[inspect.Parameter]) -> Convention | None:
    """Return the convention of a function with names of its own: (response, answer) or (response, answer, row)."""
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return None
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in places)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if needed > 3 or (len(places) < 2 and not takes_any):
        return None
    third = needed == 3 or (len(places) > 2 and places[2].name == "row")
    return Convention(("response", "answer", "row")) if third else PLAIN
