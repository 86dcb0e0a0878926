"""Read the body of a request as JSON that everything behind the gateway can handle."""

from __future__ import annotations

import json
from typing import Any

from dvpo_service.serving.errors import BadRequest

MAX_DEPTH = 64  # objects and arrays within each other; JSON schemas and tool calls need about a dozen


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
      BadRequest: the body is not UTF-8, no JSON, no object, or nested deeper than ``MAX_DEPTH``; or it has a number
        beyond 64 bits, which some fields of vLLM cannot hold, or text with half a surrogate pair, which has no UTF-8
        form and which no tokenizer takes.
    """
    try:
        tree = json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except RecursionError:
        raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise BadRequest(f"the body must be a JSON object, this is {type(tree).__name__}")
    _check(tree)
    return tree


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check(tree: dict[str, Any]) -> None:
    """Raise BadRequest for what JSON's grammar allows and nothing behind the gateway can handle."""
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.keys()
                below += node.values()
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str):
                _check_text(node)
            elif isinstance(node, float | int) and not abs(node) < 2**63:
                raise BadRequest("the body has a number beyond 64 bits")
        if not below:
            return
        level = below
    raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"the body has text with half a surrogate pair: {text[:40]!a}") from error
