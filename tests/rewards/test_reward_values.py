"""Numbers that a reward may return, and answers as MATH writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dvpo_service.rewards import math_verify
from dvpo_service.rewards.calling import Work
from dvpo_service.rewards.scoring import Scorer


def scored(value: Any) -> Any:
    return Scorer("own", lambda response, answer: value).results(Work(["r"], "a", [0]))[0]


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (np.isclose(1.0, 1.0), 1.0),
        (np.bool_(False), 0.0),
        (np.float32(0.5), 0.5),
        (np.array(0.25), 0.25),
        (torch.tensor(0.75), 0.75),
        (torch.tensor(True), 1.0),
        (True, 1.0),
        (1, 1.0),
    ],
)
def test_every_single_number_is_a_reward(value: Any, reward: float) -> None:
    score = scored(value)
    assert (score.error, score.value) == (None, reward)
    assert type(score.value) is float


@pytest.mark.parametrize("value", [np.array([1.0]), torch.ones(2), np.array(np.nan), "1", None, [1.0], 1j])
def test_what_is_no_finite_number_fails_the_sample(value: Any) -> None:
    assert "not a finite number" in scored(value).error


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"It costs \boxed{18.90}", r"\$18.90", 1.0),
        (r"It costs \boxed{\$18.90}", r"\$18.90", 1.0),
        (r"It costs \boxed{18.9} dollars", r"\boxed{\$18.90}", 1.0),
        (r"It costs \boxed{18.91}", r"\$18.90", 0.0),
        (r"\boxed{\frac{1}{2}}", r"$\frac{1}{2}$", 1.0),
    ],
)
def test_escaped_dollars_are_currency(response: str, answer: str, right: float) -> None:
    assert math_verify.score(response, answer) == right
