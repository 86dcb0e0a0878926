"""Reward: the share of an answer's characters that are right, position by position."""

from __future__ import annotations

from dvpo_service.rewards.exact_match import extract

__all__ = ["extract", "score"]


def score(response: str, answer: str) -> float:
    """Return the share of positions at which both have the same character, of the longer one's positions."""
    response, answer = response.strip(), answer.strip()
    positions = max(len(response), len(answer))
    right = sum(a == b for a, b in zip(response, answer, strict=False))
    return right / positions if positions else 1.0
