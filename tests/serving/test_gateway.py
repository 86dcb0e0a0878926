"""The gateway on fake replicas in memory: limits, refusals, ranking, streams that are cut off."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from dvpo_service.config import ServeConfig
from dvpo_service.serving.gateway import Gateway
from dvpo_service.serving.policy import Answer, PolicyServer
from dvpo_service.serving.replicas import Unavailable
from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.value_server import ValueServer
from dvpo_service.serving.values import ResponseValues, ValueQuery


@dataclass
class FakePolicy:
    """Answers with ``n`` choices.

    ``hold`` keeps requests under way until it is set; ``lost`` fails as if no replica were left; ``cut`` ends a stream
    in its middle, as when its replica dies.
    """

    hold: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    cut: bool = False
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hold.set()

    async def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        if self.lost:
            raise Unavailable("no answer within 1 s")
        if method is PolicyServer.ready:
            return "step-000007"
        self.seen.append(args[1])
        await self.hold.wait()
        choices = [
            {"index": i, "text": f"t{i}", "token_ids": [5, 6 + i, 1], "prompt_token_ids": [2, 3], "finish_reason": end}
            for i, end in zip(range(args[1].get("n", 1)), ["stop", "length"] * 50, strict=False)
        ]
        return Answer(200, json.dumps({"choices": choices}).encode(), "step-000007")

    async def stream(self, method: Callable[..., Any], kind: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        if body.get("bad"):
            yield Answer(400, b'{"error": {"message": "no"}}', "step-000007")
            return
        yield Answer(200, b"", "step-000007")
        yield "data: 1\n\n"
        await self.hold.wait()
        if self.cut:
            raise Unavailable("its replica died")
        yield "data: [DONE]\n\n"


@dataclass
class FakeValues:
    seen: list[ValueQuery] = field(default_factory=list)

    async def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        if method is ValueServer.ready:
            return "step-000007"
        if method is ValueServer.along:
            if len(args[0].response) > 5:
                raise BadRequest("too long")
            return {"body": {"states": []}, "version": "step-000007"}
        self.seen = args[0]
        return [
            ResponseValues(0.1, 0.1, [], [[]], [float(i)], [float(-i)], [0.0], [0.0]) for i, _ in enumerate(args[0])
        ]


def client(
    policy: FakePolicy | None = None, values: FakeValues | None = None, key: str | None = None, **limits: Any
) -> httpx.AsyncClient:
    digest = hashlib.sha256(key.encode()).hexdigest() if key else None
    gateway = Gateway(policy or FakePolicy(), values, ServeConfig(**limits), "m", digest)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app()), base_url="http://test")


COMPLETIONS = "/v1/completions"


async def status(c: httpx.AsyncClient, path: str, body: Any, **headers: str) -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await c.post(path, content=content, headers=headers)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"{", 400, "not JSON"),
        (b'"\xff"', 400, "not JSON"),
        ([], 400, "JSON object"),
        ({"n": "three"}, 400, "positive integer"),
        ({"n": 0}, 400, "positive integer"),
        ({"prompt": ["a"] * 5, "n": 3}, 400, "more than 10 a request"),
        ({"max_tokens": 51}, 400, "more than 50"),
        ({"rank_by": "luck"}, 400, "one of mean, cvar, upper_tail"),
        ({"rank_by": "mean", "stream": True}, 400, "cannot stream"),
        (b" " * 3000, 413, "larger than 2 KiB"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_in_words(body: Any, code: int, says: str) -> None:
    c = client(values=FakeValues(), max_n=10, max_new_tokens=50, max_body_kib=2)
    answered, message = asyncio.run(status(c, COMPLETIONS, body))
    assert answered == code
    assert says in message


def test_the_default_length_is_within_the_limit() -> None:
    policy = FakePolicy()
    asyncio.run(status(client(policy, max_new_tokens=50), COMPLETIONS, {"prompt": "a"}))
    assert policy.seen[0]["max_tokens"] == 50


def test_more_than_the_limit_under_way_is_429_and_health_still_answers() -> None:
    async def scenario() -> None:
        policy = FakePolicy()
        policy.hold.clear()
        c = client(policy, max_requests=2)
        held = [asyncio.create_task(status(c, COMPLETIONS, {"prompt": "a"})) for _ in range(2)]
        await asyncio.sleep(0.05)
        answer = await c.post(COMPLETIONS, json={"prompt": "a"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert (await c.get("/healthz")).status_code == 200
        assert "dvpo_requests_under_way 2.0" in (await c.get("/metrics")).text
        policy.hold.set()
        assert [code for code, _ in await asyncio.gather(*held)] == [200, 200]
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 200, "room again"

    asyncio.run(scenario())


def test_a_stream_counts_as_under_way_until_its_end() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(), max_requests=1)
        for _ in range(3):
            answer = await c.post(COMPLETIONS, json={"prompt": "a", "stream": True})
            assert answer.text == "data: 1\n\ndata: [DONE]\n\n"
        assert "dvpo_requests_under_way 0.0" in (await c.get("/metrics")).text

    asyncio.run(scenario())


def test_a_stream_cut_in_the_middle_says_so_and_one_refused_is_no_stream() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(cut=True))
        answer = await c.post(COMPLETIONS, json={"prompt": "a", "stream": True})
        first, error, done = answer.text.strip().split("\n\n")
        assert first == "data: 1"
        assert "its replica died" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert done == "data: [DONE]"
        answer = await c.post(COMPLETIONS, json={"prompt": "a", "stream": True, "bad": True})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no")

    asyncio.run(scenario())


def test_the_key_guards_the_api_and_not_the_health_checks() -> None:
    async def scenario() -> None:
        c = client(key="secret")
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 401
        assert (await status(c, COMPLETIONS, {"prompt": "a"}, authorization="Bearer wrong"))[0] == 401
        assert (await status(c, COMPLETIONS, {"prompt": "a"}, authorization="Bearer secret"))[0] == 200
        assert (await c.get("/v1/models")).status_code == 401
        assert (await c.get("/readyz")).status_code == 200
        assert (await c.get("/")).status_code == 200

    asyncio.run(scenario())


def test_best_of_n_returns_one_choice_a_prompt_and_what_each_was_worth() -> None:
    async def scenario() -> None:
        values = FakeValues()
        c = client(FakePolicy(), values)
        body = (await c.post(COMPLETIONS, json={"prompt": "a", "n": 3, "rank_by": "mean"})).json()
        assert [c["text"] for c in body["choices"]] == ["t2"]
        assert [r["index"] for r in body["ranking"]] == [2, 1, 0]
        assert "token_ids" not in body["choices"][0], "nobody asked for them"
        assert [q.response_ids for q in values.seen] == [(5, 6), (5, 7, 1), (5, 8)], "without the token that ends"
        body = (await c.post(COMPLETIONS, json={"prompt": "a", "n": 3, "rank_by": "cvar"})).json()
        assert [c["text"] for c in body["choices"]] == ["t0"]

    asyncio.run(scenario())


def test_without_a_critic_values_are_501_and_completions_work() -> None:
    async def scenario() -> None:
        c = client()
        assert (await status(c, "/v1/values", {"prompt": "a", "response": "b"}))[0] == 501
        assert (await status(c, COMPLETIONS, {"prompt": "a", "rank_by": "mean"}))[0] == 501
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"response": "a"}, "exactly one of prompt"),
        ({"prompt": "a", "messages": [], "response": "a"}, "exactly one of prompt"),
        ({"prompt": "a"}, "response"),
        ({"prompt": "a", "response": "b", "levels": [2]}, "levels"),
        ({"prompt": "a", "response": "b", "alpha": 0}, "alpha"),
        ({"prompt": "a", "response": "b", "lvls": []}, "lvls"),
        ({"prompt": "a", "response": "b" * 9}, "too long"),
    ],
)
def test_bad_value_requests_are_refused_in_words(body: Any, says: str) -> None:
    code, message = asyncio.run(status(client(values=FakeValues()), "/v1/values", body))
    assert code == 400
    assert says in message


def test_no_replica_is_503_and_not_ready() -> None:
    async def scenario() -> None:
        c = client(FakePolicy(lost=True))
        assert (await status(c, COMPLETIONS, {"prompt": "a"}))[0] == 503
        answer = await c.get("/readyz")
        assert (answer.status_code, answer.json()["waiting_for"]) == (503, "policy")

    asyncio.run(scenario())
