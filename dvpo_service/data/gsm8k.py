"""GSM8K as published: read the final answer, and the calculator annotations ``<<48/2=24>>``."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from dvpo_service.data.badrow import BadRow, show
from dvpo_service.errors import ConfigError

Mode = Literal["question", "calculation"]

# [0-9], not \d: the latter also takes digits of other scripts.
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_FINAL = re.compile(r"-?[0-9]*\.?[0-9]+")
_RESULT = re.compile(r"-?[0-9]{0,12}(\.[0-9]{1,6})?")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Options:
    """What to take from a solution. ``operators`` holds characters of ``+-*/``; the ``max_*`` bound a calculation."""

    mode: Mode = "question"
    operators: str = "+-"
    max_operands: int = 2
    max_digits: int = 4  # per operand

    def __post_init__(self) -> None:
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ConfigError(f"data.operators={self.operators!r}: use one or more of + - * /")
        if self.max_operands < 2 or self.max_digits < 1:
            raise ConfigError("data.max_operands must be at least 2, data.max_digits at least 1")


def final_answer(solution: str) -> str:
    """Return the number after the last ``####``, without thousands commas. Raises ``BadRow`` if there is none."""
    _, marker, tail = solution.rpartition("####")
    number = tail.strip().replace(",", "")
    if not marker or not _FINAL.fullmatch(number):
        raise BadRow("missing answer", f"`answer` does not end in '#### N' but in {show(solution[-20:])}")
    return number


def calculations(solution: str, options: Options) -> list[tuple[str, str]]:
    """Return prompt (``48/2=``) and answer (``24``) for each annotation that is a plain, right, integer calculation.

    Annotations are left out when an operand has brackets, a sign or decimals, when an operator is not in ``options``,
    or when the result is not whole or not what the expression gives. Both sides are normalised (``05`` is ``5``,
    ``27.00`` is ``27``).
    """
    kept = []
    for left, stated in _ANNOTATION.findall(solution):
        expression = _normalise(left, options)
        result = _evaluate(expression) if expression else None
        if result is not None and result.denominator == 1 and result == _number(stated):
            kept.append((f"{expression}=", str(result)))
    return kept


def _normalise(expression: str, options: Options) -> str | None:
    number = rf"[0-9]{{1,{options.max_digits}}}"
    pattern = rf"{number}([{re.escape(options.operators)}]{number}){{1,{options.max_operands - 1}}}"
    text = expression.replace(" ", "")
    if not re.fullmatch(pattern, text):
        return None
    return re.sub(r"[0-9]+", lambda digits: str(int(digits[0])), text)


def _number(text: str) -> Fraction | None:
    text = text.replace(" ", "").replace(",", "")
    return Fraction(text) if text.strip("-") and _RESULT.fullmatch(text) else None


def _evaluate(expression: str) -> Fraction | None:
    """Return the exact value with the usual precedence, or None where it divides by zero."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return Fraction(node.value)

    try:
        return value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        return None
