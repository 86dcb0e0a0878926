"""Turn one row of a data file, in any of the three accepted schemas, into prompts and answers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dvpo_service.data import gsm8k
from dvpo_service.data.badrow import BadRow, show
from dvpo_service.types import Message

ACCEPTED = (
    "{prompt: text, answer}, "
    "{prompt: [{role, content}, ...], reward_model: {ground_truth}, data_source} (verl), "
    "{question, answer ending in '#### N'} (GSM8K)"
)


class Example(NamedTuple):
    """A prompt with its answer.

    Attributes:
      answer: text, or a list or object of JSON; None only where answers are optional.
      source: names the data set or grader that it is from.
      row: the columns as the file has them, without the prompt's own.
    """

    messages: tuple[Message, ...]
    answer: Any
    source: str
    row: Mapping[str, Any] = {}


PROMPT_COLUMNS = ("prompt", "question")


def parse_row(row: object, *, source: str, options: gsm8k.Options, need_answer: bool = True) -> list[Example]:
    """Return the examples of one row: exactly one, except for GSM8K calculations, which can be any number.

    Args:
      source: the source of examples whose row has no ``data_source``.
      need_answer: a row without an answer is a bad one.

    Raises:
      BadRow: the row cannot be used.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"the row is {_kind(row)}, not an object with named fields")
    # By value, not by key: in a table of several sources every row has every column.
    given = {name for name in ("reward_model", "prompt", "question") if row.get(name) is not None}
    columns = {str(name): value for name, value in row.items() if name not in PROMPT_COLUMNS}
    chat = not need_answer and isinstance(row.get("prompt"), list)
    if "reward_model" in given or chat:
        return [_verl(row, source, need_answer)._replace(row=columns)]
    if "prompt" in given or ("prompt" in row and not given):
        return [_plain(row, source, need_answer)._replace(row=columns)]
    if "question" in given:
        return [example._replace(row=columns) for example in _gsm8k(row, options)]
    keys = ", ".join(show(k) for k in list(row)[:10]) or "none"
    raise BadRow("unknown schema", f"unknown row schema with keys {keys}; accepted: {ACCEPTED}")


def _plain(row: Mapping, source: str, need_answer: bool) -> Example:
    if isinstance(row["prompt"], list):
        raise BadRow("missing answer", "`prompt` is a list of messages but `reward_model` is missing")
    messages = (Message(role="user", content=_prompt_text(row["prompt"], "prompt")),)
    return Example(messages, _answer(row.get("answer"), "answer", need_answer), _source(row, source))


def _verl(row: Mapping, source: str, need_answer: bool) -> Example:
    turns = row.get("prompt")
    if not isinstance(turns, list):
        raise BadRow("wrong type", f"`prompt` is {_kind(turns)}, not a list of chat messages")
    if not turns:
        raise BadRow("empty prompt", "`prompt` has no messages")
    messages = tuple(_message(turn, f"prompt[{i}]") for i, turn in enumerate(turns) if not _is_empty_system(turn))
    if row.get("reward_model") is None:  # only where answers are optional
        return Example(messages, _answer(row.get("answer"), "answer", need_answer), _source(row, source))
    reward_model = _mapping(row["reward_model"])
    if not isinstance(reward_model, Mapping):
        raise BadRow("wrong type", f"`reward_model` is {_kind(reward_model)}, not an object")
    answer = _answer(reward_model.get("ground_truth"), "reward_model.ground_truth", need_answer)
    return Example(messages, answer, _source(row, source))


def _gsm8k(row: Mapping, options: gsm8k.Options) -> list[Example]:
    question = _prompt_text(row["question"], "question")
    solution = _text(_answer(row.get("answer"), "answer"), "answer")
    final = gsm8k.final_answer(solution)
    if options.mode == "question":
        return [Example((Message(role="user", content=question),), final, "gsm8k")]
    return [
        Example((Message(role="user", content=prompt),), answer, "gsm8k/calculation")
        for prompt, answer in gsm8k.calculations(solution, options)
    ]


def _mapping(value: object) -> object:
    """Return a mapping that a table holds in another way: as a list of pairs (a map column), or as JSON text."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return dict(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _is_empty_system(turn: object) -> bool:
    """Return whether it is a system message without content, which some data sets have in every row."""
    return isinstance(turn, Mapping) and turn.get("role") == "system" and turn.get("content") in ("", None)


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


def _answer(value: object, where: str, need_answer: bool = True) -> Any:
    empty = value is None or (isinstance(value, str) and not value.strip())
    if empty and not need_answer:
        return None
    if value is None:
        raise BadRow("missing answer", f"`{where}` is missing")
    if isinstance(value, list | Mapping):
        return _json(value, where)
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Only a float can be infinite, and asking an int of 400 digits would raise.
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow("wrong type", f"`{where}` is {value}, not a finite number")
        # A gap makes floats of a column of whole numbers: its 2.0 is the answer 2.
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        return str(int(value) if whole else value)
    text = _text(value, where).strip()
    if not text:
        raise BadRow("missing answer", f"`{where}` is empty")
    return text


def _json(value: Any, where: str) -> Any:
    """Return a list or object, if it is one of JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow("not UTF-8", f"`{where}` has a lone surrogate") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("wrong type", f"`{where}` holds a value that JSON does not have: {error}") from error
    return value


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
