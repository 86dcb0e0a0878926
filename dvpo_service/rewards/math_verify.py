"""Score 1 where the response's final expression is mathematically equal to the answer (the math-verify library)."""

from __future__ import annotations

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


def score(response: str, answer: str) -> float:
    """Return 1.0 when the library shows equality, else 0.0 (also for a response that does not parse).

    The answer may be LaTeX, with or without ``$`` or ``\\boxed``.

    Raises:
      ValueError: the answer itself does not parse.
    """
    library = _library()
    answer = answer.replace("\\$", "")  # a currency sign, as MATH writes \$18.90; a bare $ delimits LaTeX
    wrapped = answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
    gold = library.parse(wrapped, parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot parse the answer {answer!r}")
    return float(library.verify(gold, library.parse(response, parsing_timeout=None), timeout_seconds=None))


def extract(response: str) -> str | None:
    """Return the final expression as the response spells it, or None. Other spellings of the same value differ."""
    parsed = _library().parse(response, parsing_timeout=None)
    return str(parsed[-1]).strip() if parsed else None
