"""The response's final expression is mathematically equal to the answer (the math-verify library)."""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def _library() -> ModuleType:
    """Imported on first use: it brings sympy, which takes a second that other rewards need not wait."""
    import math_verify
    from math_verify import grader, parser

    # Its timeouts are signals, which only a main thread can take, so they are off; the reward
    # actor's deadline stands in for them, and the library need not warn about it.
    parser.TIMEOUT_WARNING_SHOWN = grader.TIMEOUT_WARNING_SHOWN = True
    return math_verify


def score(response: str, answer: str) -> float:
    """1.0 when equality is shown, else 0.0 (also for a response that does not parse).

    The answer may be LaTeX, with or without ``$`` or ``\\boxed``. Raises ``ValueError`` when
    the answer itself does not parse.
    """
    library = _library()
    wrapped = answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
    gold = library.parse(wrapped, parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot parse the answer {answer!r}")
    return float(library.verify(gold, library.parse(response, parsing_timeout=None), timeout_seconds=None))


def extract(response: str) -> str | None:
    """The final expression as the response spells it, or None. Equal values spelled otherwise differ."""
    parsed = _library().parse(response, parsing_timeout=None)
    return str(parsed[-1]).strip() if parsed else None
