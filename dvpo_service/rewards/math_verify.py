"""Score 1 where the response's final expression is mathematically equal to the answer (the math-verify library)."""

from __future__ import annotations

import re
from functools import cache
from types import ModuleType


@cache
def _library() -> ModuleType:
    """Import math-verify on first use: it imports sympy, which takes a second that other rewards need not wait."""
    import math_verify
    from math_verify import grader, parser

    # Its timeouts use signals, which only the main thread can receive, so they are off. The reward actor's deadline
    # replaces them, and the library's warning about missing timeouts is silenced.
    parser.TIMEOUT_WARNING_SHOWN = grader.TIMEOUT_WARNING_SHOWN = True
    return math_verify


def _readable(text: str) -> str:
    """Return the text in spellings that math-verify reads."""
    # A currency sign: MATH writes \\$18.90. The library would take it for the start of LaTeX, as a bare $ is.
    text = re.sub(r"(?<=\w)(?<!\\)\\\$", " ", text)
    text = re.sub(r"(?<!\\)\\\$", "", text)
    text = text.replace("\\fbox{", "\\boxed{").replace("°", "^\\circ").replace("∞", "\\infty")
    return re.sub(r"(?<=\d)\.(?=\s*\})", "", text)  # the period of a sentence, inside \\boxed{42.}


def score(response: str, answer: str) -> float:
    """Return 1.0 when the library shows equality, else 0.0 (also for a response that does not parse).

    The answer may be LaTeX, with or without ``$`` or ``\\boxed``. What counts as equal is the library's choice;
    docs/extending.md has its less obvious choices, and tests/rewards/test_math_answers.py holds it to them.

    Raises:
      ValueError: the answer itself does not parse.
    """
    library = _library()
    answer = _readable(answer)
    wrapped = answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
    gold = library.parse(wrapped, parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot parse the answer {answer!r}")
    found = library.parse(_readable(response), parsing_timeout=None)
    return float(library.verify(gold, found, timeout_seconds=None))


def extract(response: str) -> str | None:
    """Return the final expression as the response spells it, or None. Other spellings of the same value differ."""
    parsed = _library().parse(_readable(response), parsing_timeout=None)
    return str(parsed[-1]).strip() if parsed else None
