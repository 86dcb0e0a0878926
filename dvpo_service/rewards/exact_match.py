"""The response is the answer, white space at its ends aside."""

from __future__ import annotations


def score(response: str, answer: str) -> float:
    """1.0 or 0.0."""
    return float(response.strip() == answer.strip())


def extract(response: str) -> str | None:
    """The response's text, or None if it is empty."""
    return response.strip() or None
