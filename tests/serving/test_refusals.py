"""What a client sends wrong is a 400 that says what, and counts as one; limits hold for every form of a number."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.serving.fake_replicas import CHAT, COMPLETIONS, TURN, VALUES, A, FakePolicy, FakeValues, client, status


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"{", 400, "not JSON"),
        (b'{"prompt": "\xff"}', 400, "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "beyond 64 bits"),
        (A | {"top_k": 10**30}, 400, "beyond 64 bits"),
        (A | {"logit_bias": {"5": -(10**30)}}, 400, "beyond 64 bits"),
        ([], 400, "JSON object"),
        ({}, 400, "prompt: Field required"),
        (A | {"n": "three"}, 400, "n: Input should be a valid integer"),
        (A | {"n": 0}, 400, "greater than or equal to 1"),
        (A | {"best_of": 5}, 400, "best_of: only 1 is supported"),
        ({"prompt": ["a"] * 5, "n": 3}, 400, "more than 10 a request"),
        ({"prompt": [[1, 2]] * 11}, 400, "more than 10 a request"),
        ({"prompt": []}, 400, "none of it empty"),
        ({"prompt": ["a", 5]}, 400, "a list of texts"),
        (A | {"stream": "no"}, 400, "stream: Input should be a valid boolean"),
        (A | {"rank_by": "luck"}, 400, "'mean', 'cvar' or 'upper_tail'"),
        (A | {"rank_by": "mean", "stream": True}, 400, "without stream"),
        (A | {"rank_by": "mean", "echo": True}, 400, "without echo"),
        (b" " * 3000, 413, "larger than 2 KiB"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_in_words(body: Any, code: int, says: str) -> None:
    c = client(values=FakeValues(), max_n=10, max_new_tokens=50, max_body_kib=2)
    answered, message = asyncio.run(status(c, COMPLETIONS, body))
    assert answered == code
    assert says in message


@pytest.mark.parametrize("number", ["60", "60.0", "6e1", "6E+1", '"60"', "true", "-1", "40.5", "[40]", "1e400"])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        (COMPLETIONS, "max_tokens"),
        (COMPLETIONS, "n"),
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (CHAT, "n"),
    ],
)
def test_a_limit_holds_in_whatever_form_the_number_comes(path: str, field: str, number: str) -> None:
    policy = FakePolicy()
    body = json.dumps(A | TURN)[:-1] + f', "{field}": {number}}}'
    code, _ = asyncio.run(status(client(policy, max_new_tokens=40, max_n=40), path, body.encode()))
    assert code == 400
    assert not policy.seen
    body = body.replace(number, "4e1")
    assert asyncio.run(status(client(policy, max_new_tokens=40, max_n=40), path, body.encode()))[0] == 200
    assert (policy.seen[0][field], type(policy.seen[0][field])) == (40, int), "the engine gets what was checked"


HALF = "\\ud83d"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, f'{{"prompt": "{HALF}"}}'),
        (COMPLETIONS, f'{{"prompt": ["a", "{HALF}"]}}'),
        (COMPLETIONS, f'{{"prompt": "a", "stop": ["{HALF}"]}}'),
        (COMPLETIONS, f'{{"prompt": "a", "{HALF}": 1}}'),
        (CHAT, f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}'),
        (CHAT, f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "{HALF}"}}]}}]}}'),
        (VALUES, f'{{"prompt": "a", "response": "{HALF}"}}'),
        (VALUES, f'{{"prompt": "a", "response": "b", "model": "{HALF}"}}'),
    ],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(path: str, body: str) -> None:
    code, message = asyncio.run(status(client(values=FakeValues()), path, body.encode()))
    assert code == 400
    assert "half a surrogate pair" in message
    whole = body.replace(HALF, HALF + "\\ude00")
    code, message = asyncio.run(status(client(values=FakeValues()), path, whole.encode()))
    assert code == (404 if "model" in body else 200), message


@pytest.mark.parametrize("depth", [70, 900, 100_000])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, VALUES])
def test_deep_nesting_is_refused_and_counted_as_the_clients_mistake(path: str, depth: int) -> None:
    async def scenario() -> None:
        c = client(values=FakeValues())
        body = b'{"x": ' + b"[" * depth + b"]" * depth + b"}"
        code, message = await status(c, path, body)
        assert (code, message) == (400, "the body is nested deeper than 64 levels")
        counted = (await c.get("/metrics")).text
        assert f'dvpo_requests_total{{route="{path}",status="400"}} 1.0' in counted
        assert 'status="499"' not in counted

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"response": "a"}, "exactly one of prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "response": "a"}, "exactly one of prompt"),
        ({"prompt": "a"}, "response"),
        ({"prompt": "a", "response": "b", "levels": [2]}, "levels"),
        ({"prompt": "a", "response": "b", "levels": ["0.5"]}, "levels.0: Input should be a valid number"),
        ({"prompt": "a", "response": "b", "levels": [0.5] * 257}, "256 items"),
        ({"prompt": "a", "response": "b", "alpha": 0}, "alpha"),
        ({"prompt": "a", "response": "b", "alpha": "0.5"}, "alpha"),
        ({"messages": [{"role": "user"}], "response": "a"}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": None}], "response": "a"}, "messages.0.content"),
        ({"messages": [{"content": "a"}], "response": "a"}, "messages.0.role"),
        ({"prompt": "a", "response": "b", "lvls": []}, "lvls"),
        ({"prompt": "a", "response": "b" * 9}, "too long"),
    ],
)
def test_bad_value_requests_are_refused_in_words(body: Any, says: str) -> None:
    code, message = asyncio.run(status(client(values=FakeValues()), "/v1/values", body))
    assert code == 400
    assert says in message
