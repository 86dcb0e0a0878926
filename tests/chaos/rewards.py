"""Reward functions that misbehave if the injector has marked the response."""

from __future__ import annotations

import math
import time
from typing import Any

from dvpo_service.rewards import exact_match
from tests.e2e.rewards import short_answer

MARK = "\x00chaos:"


def marked(kind: str) -> str:
    """Return the text that replaces a response to cause a fault of this kind."""
    return MARK + kind


def exact(response: str, answer: str) -> Any:
    return misbehave(response) if response.startswith(MARK) else exact_match.score(response, answer)


def short(response: str, answer: str) -> Any:
    return misbehave(response) if response.startswith(MARK) else short_answer(response, answer)


def misbehave(response: str) -> Any:
    kind = response.removeprefix(MARK)
    if kind == "reward-raise":
        raise ValueError("a reward function's own mistake")
    if kind == "reward-hang":
        time.sleep(3600)
    if kind == "reward-memory":
        return float(len([bytearray(2**26) for _ in range(2**10)]))  # 64 GiB, as fast as they can be allocated
    return {"reward-nan": math.nan, "reward-none": None, "reward-text": "0.5"}[kind]
