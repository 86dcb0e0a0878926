"""Score a response's Python program by tests: what it prints for given input, or what a function of it returns.

The answer is an object (or its JSON text) with ``inputs`` and ``outputs``, a test each: texts for standard input and
output, or with ``fn_name`` lists of arguments and the values that the function should return.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo_service.config.code import CodeConfig
from dvpo_service.rewards import sandbox_call
from dvpo_service.rewards.sandbox import Ran, run_program

PROGRAM, CALL = "program.py", "call.py"
_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Tests:
    """What the program must do: ``function`` is None for standard input and output."""

    inputs: list[Any]
    outputs: list[Any]
    function: str | None = None


def score(response: str, answer: Any, limits: CodeConfig | None = None) -> dict[str, float]:
    """Return the score, and the share of tests passed, whether one ran out of time or a limit, and whether one raised.

    Without ``limits.partial`` the score is 1 where all tests pass, else 0, and tests after the first failure are not
    run.

    Raises:
      ValueError: the answer is no tests.
      SandboxFailed: a program could not be started, which is not its fault.
    """
    limits = limits or CodeConfig()
    tests = tests_of(answer)
    program = extract(response)
    passed = stopped = raised = 0
    until = time.monotonic() + limits.program_s
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        if time.monotonic() > until:
            stopped += 1
            break
        ran = _run(program or "", tests.function, given, limits)
        right = ran.stopped is None and ran.code == 0 and _is_right(ran, tests.function, expected)
        passed += right
        stopped += ran.stopped is not None
        raised += ran.stopped is None and ran.code != 0
        if not right and not limits.partial:
            break
    share = passed / len(tests.inputs)
    return {
        "score": share if limits.partial else float(share == 1),
        "tests_passed": share,
        "stopped": float(stopped > 0),
        "raised": float(raised > 0),
    }


def extract(response: str) -> str | None:
    """Return the last block of code of the response, the whole response if there is none, None if it is empty."""
    blocks = _BLOCK.findall(response)
    return (blocks[-1] if blocks else response).strip() or None


def tests_of(answer: Any) -> Tests:
    """Return the tests that an answer gives. Raises ValueError."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError("the code reward needs tests as the answer, an object or its JSON text") from error
    given = answer if isinstance(answer, Mapping) else {}
    inputs, outputs, function = given.get("inputs"), given.get("outputs"), given.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0):
        raise ValueError("the code reward needs an answer with inputs and outputs, two lists of the same length")
    if function is None:
        if not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise ValueError("without fn_name, the code reward's inputs and outputs are texts")
        return Tests(inputs, outputs)
    return Tests([_arguments(each) for each in inputs], outputs, str(function))


def _arguments(given: Any) -> list[Any]:
    """Return a call's arguments: a list, or text with an argument in JSON on each line."""
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise ValueError("with fn_name, each of the code reward's inputs is a list of arguments")
    return given


def _run(program: str, function: str | None, given: Any, limits: CodeConfig) -> Ran:
    if function is None:
        return run_program({PROGRAM: program}, PROGRAM, given, limits)
    files = {PROGRAM: program, CALL: Path(sandbox_call.__file__).read_text()}
    return run_program(files, CALL, json.dumps({"function": function, "arguments": given}), limits)


def _is_right(ran: Ran, function: str | None, expected: Any) -> bool:
    if function is None:
        return _lines(ran.out) == _lines(expected)
    try:
        returned = json.loads(ran.out)
    except (ValueError, RecursionError):
        return False
    if _same(returned, expected):
        return True
    # Some data sets write the value as JSON text.
    try:
        return isinstance(expected, str) and _same(returned, json.loads(expected))
    except ValueError:
        return False


def _lines(text: str) -> list[str]:
    """Return the lines without white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are equal, numbers to nine digits."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return one == other
