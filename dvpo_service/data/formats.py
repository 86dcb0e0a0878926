"""Turn one row of a data file, in any of the three accepted schemas, into prompts and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from dvpo_service.data import gsm8k
from dvpo_service.data.badrow import BadRow, show
from dvpo_service.types import Message

ACCEPTED = (
    "{prompt: text, answer}, "
    "{prompt: [{role, content}, ...], reward_model: {ground_truth}, data_source} (verl), "
    "{question, answer ending in '#### N'} (GSM8K)"
)


class Example(NamedTuple):
    """A prompt with its answer; ``source`` names the data set or grader that it is from."""

    messages: tuple[Message, ...]
    answer: str
    source: str


def parse_row(row: object, *, source: str, options: gsm8k.Options) -> list[Example]:
    """Return the examples of one row: exactly one, except for GSM8K calculations, which can be any number.

    Args:
      source: the source of examples whose row has no ``data_source``.

    Raises:
      BadRow: the row cannot be used.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"the row is {_kind(row)}, not an object with named fields")
    if "reward_model" in row:
        return [_verl(row, source)]
    if "prompt" in row:
        return [_plain(row, source)]
    if "question" in row:
        return _gsm8k(row, options)
    keys = ", ".join(show(k) for k in list(row)[:10]) or "none"
    raise BadRow("unknown schema", f"unknown row schema with keys {keys}; accepted: {ACCEPTED}")


def _plain(row: Mapping, source: str) -> Example:
    if isinstance(row["prompt"], list):
        raise BadRow("missing answer", "`prompt` is a list of messages but `reward_model` is missing")
    messages = (Message(role="user", content=_prompt_text(row["prompt"], "prompt")),)
    return Example(messages, _answer(row.get("answer"), "answer"), _source(row, source))


def _verl(row: Mapping, source: str) -> Example:
    turns = row.get("prompt")
    if not isinstance(turns, list):
        raise BadRow("wrong type", f"`prompt` is {_kind(turns)}, not a list of chat messages")
    if not turns:
        raise BadRow("empty prompt", "`prompt` has no messages")
    messages = tuple(_message(turn, f"prompt[{i}]") for i, turn in enumerate(turns))
    reward_model = row["reward_model"]
    if not isinstance(reward_model, Mapping):
        raise BadRow("wrong type", f"`reward_model` is {_kind(reward_model)}, not an object")
    answer = _answer(reward_model.get("ground_truth"), "reward_model.ground_truth")
    return Example(messages, answer, _source(row, source))


def _gsm8k(row: Mapping, options: gsm8k.Options) -> list[Example]:
    question = _prompt_text(row["question"], "question")
    solution = _answer(row.get("answer"), "answer")
    final = gsm8k.final_answer(solution)
    if options.mode == "question":
        return [Example((Message(role="user", content=question),), final, "gsm8k")]
    return [
        Example((Message(role="user", content=prompt),), answer, "gsm8k/calculation")
        for prompt, answer in gsm8k.calculations(solution, options)
    ]


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow("wrong type", f"`{where}` is {_kind(turn)}, not an object with role and content")
    role = _text(turn.get("role"), f"{where}.role")
    return Message(role=role, content=_prompt_text(turn.get("content"), f"{where}.content"))


def _prompt_text(value: object, where: str) -> str:
    text = _text(value, where)
    if not text.strip():
        raise BadRow("empty prompt", f"`{where}` is empty")
    return text


def _answer(value: object, where: str) -> str:
    if value is None:
        raise BadRow("missing answer", f"`{where}` is missing")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(
            value
        ):  # only a float: an int of 400 digits would not fit one
            raise BadRow("wrong type", f"`{where}` is {value}, not a finite number")
        return str(value)
    text = _text(value, where).strip()
    if not text:
        raise BadRow("missing answer", f"`{where}` is empty")
    return text


def _source(row: Mapping, default: str) -> str:
    value = row.get("data_source")
    return default if value is None else _text(value, "data_source")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{where}` is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which no tokenizer takes
        raise BadRow("not UTF-8", f"`{where}` has a lone surrogate at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
