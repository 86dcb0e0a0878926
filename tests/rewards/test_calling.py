"""How reward functions of every shape are called, and what they may return."""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dvpo_service.errors import ConfigError
from dvpo_service.rewards.calling import Work, convention_of
from dvpo_service.rewards.scoring import Result, Scorer

ROW = {"answer": 4, "level": 3, "tags": ["sum"]}
WORK = Work(
    ["4", "5"], "4", [0, 1], "sums", ROW, ({"role": "system", "content": "s"}, {"role": "user", "content": "?"})
)


def scorer(function: Callable[..., Any]) -> Scorer:
    return Scorer("own", function, convention_of("own", function))


def values(function: Callable[..., Any], work: Work = WORK) -> list[float]:
    results = scorer(function).results(work)
    assert [r.error for r in results] == [None] * len(results)
    return [r.value for r in results]


def by_name(response, answer):
    return response == answer


def with_row(response, answer, row):
    return (response == answer) * row["level"]


def scaled(response, answer, scale):
    return (response == answer) * scale


def a_row_by_place(text, gold, columns):
    return (text == gold) * columns["level"]


def own_names(text, gold, strict=True):
    return (text == gold) and strict is True


def only_the_response(response):
    return len(response)


def a_column(response, *, answer, level, tags=(), missing=7):
    return (response == answer) * level + 0.5 * (tags == ["sum"]) + 0.25 * (missing == 7)


def everything(**given):
    assert set(given) == {"response", "answer", "row", "prompt", "messages", "source", "level", "tags"}
    assert (given["prompt"], given["source"], len(given["messages"])) == ("?", "sums", 2)
    return given["response"] == given["answer"] == str(given["row"]["answer"])


async def later(response, answer):
    await asyncio.sleep(0.05)
    return response == answer


def batch(responses, answers, rows):
    return [(r == a) * row["level"] for r, a, row in zip(responses, answers, rows, strict=True)]


def as_in_trl(prompts, completions, level, **kwargs):
    assert (prompts, kwargs["tags"], kwargs["answer"]) == (["?", "?"], [["sum"], ["sum"]], ["4", "4"])
    return np.array([c == "4" for c in completions]) * np.array(level)


async def async_batch(responses, answers):
    await asyncio.sleep(0)
    return torch.tensor([float(r == a) for r, a in zip(responses, answers, strict=True)])


class Callable_:
    def __call__(self, response, answer):
        return response == answer


class Later:
    async def __call__(self, response, answer):
        return response == answer


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (by_name, [1, 0]),
        (with_row, [3, 0]),
        (a_row_by_place, [3, 0]),
        (own_names, [1, 0]),
        (only_the_response, [1, 1]),
        (a_column, [3.75, 0.75]),
        (everything, [1, 0]),
        (later, [1, 0]),
        (batch, [3, 0]),
        (as_in_trl, [3, 0]),
        (async_batch, [1, 0]),
        (Callable_(), [1, 0]),
        (Later(), [1, 0]),
        (functools.partial(scaled, scale=9), [9, 0]),
        (lambda r, a: later(r, a), [1, 0]),
    ],
)
def test_a_function_gets_what_its_signature_asks_for(function, expected):
    assert values(function) == expected


@pytest.mark.parametrize(
    "function",
    [lambda: 1, lambda text: 1, lambda a, b, c, d: 1, lambda a, b, *, level: 1],
)
def test_arguments_that_fit_nothing_are_refused_in_one_line(function):
    with pytest.raises(ConfigError, match=r"reward 'm:f': its arguments \(.*\) fit nothing; take \(response") as caught:
        convention_of("m:f", function)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "columns"),
    [(a_column, ("level",)), (as_in_trl, ("level",)), (by_name, ()), (everything, ()), (own_names, ())],
)
def test_the_columns_that_a_function_needs_are_known(function, columns):
    assert convention_of("f", function).columns == columns


def test_a_row_without_the_column_fails_its_response_only_in_words():
    [result, _] = scorer(a_column).results(Work(["4", "5"], "4", [0, 0]))
    assert result.error == "KeyError: \"the row has no column 'level'\""


def test_the_row_is_a_copy_that_a_function_may_change():
    values(lambda response, row: row.clear() or 1.0)
    assert ROW["level"] == 3


def test_metrics_come_beside_the_score():
    returned = {"score": True, "length": np.int64(3), "right": torch.tensor(1.0), "pred": "four", "nan": float("nan")}
    [result, _] = scorer(lambda response, answer: returned).results(WORK)
    assert result == Result(1.0, {"length": 3.0, "right": 1.0}), "what is no number is no metric"
    [first, second] = scorer(lambda responses: [{"score": 1, "n": 2}, "bad"]).results(WORK)
    assert first == Result(1.0, {"n": 2.0})
    assert second.error == "the scoring function returned 'bad', not a finite number"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"reward": 1}, "a dict without 'score', it has ['reward']"),
        ({"score": "high"}, "returned 'high', not a finite number"),
        ({"score": None}, "returned None, not a finite number"),
    ],
)
def test_a_dict_without_a_score_fails_the_sample(returned, said):
    [result, _] = scorer(lambda response, answer: returned).results(WORK)
    assert said in result.error


@pytest.mark.parametrize("returned", [[1.0], "ab", 1.0, None, {"score": [1, 2]}, np.ones((2, 2))])
def test_a_batch_must_return_a_score_per_response(returned):
    for result in scorer(lambda responses, answers: returned).results(WORK):
        assert "returned" in result.error


def test_calls_of_an_async_function_run_side_by_side_each_with_its_deadline():
    async def slow(response, answer):
        await asyncio.sleep(60 if response == "5" else 1.0)
        return 1.0

    started = time.perf_counter()
    results = scorer(slow).results(Work(["4"] * 20 + ["5"], "4", [0] * 21), timeout_s=4.0)
    assert time.perf_counter() - started < 15
    assert [r.value for r in results[:20]] == [1.0] * 20
    assert results[20].error == "no answer within 4 s"


def test_an_error_shows_no_secret(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter2-and-more")

    def leaky(response, answer):
        raise ValueError(f"401 for {os.environ['MY_API_KEY']}")

    assert scorer(leaky).results(WORK)[0].error == "ValueError: 401 for ***"


@pytest.mark.parametrize("answer", ["4", ["4", "four"], {"value": 4}, []])
def test_an_answer_may_be_any_json(answer):
    def same(response, answer):
        return answer is not None and (answer == wanted)

    wanted = answer
    assert values(same, Work(["4"], answer, [0])) == [1.0]
