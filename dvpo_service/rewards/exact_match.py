"""Score 1 where the response equals the answer, apart from white space at the ends."""

from __future__ import annotations


def score(response: str, answer: str) -> float:
    """Return 1.0 if the stripped texts are equal, else 0.0."""
    return float(response.strip() == answer.strip())


def extract(response: str) -> str | None:
    """Return the stripped response, or None if it is empty."""
    return response.strip() or None
