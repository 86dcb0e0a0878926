"""Replicas in memory, and a gateway on them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from dvpo_service.config import ServeConfig
from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.gateway import Gateway
from dvpo_service.serving.policy import Answer, PolicyServer
from dvpo_service.serving.replicas import Unavailable
from dvpo_service.serving.returned import Returned
from dvpo_service.serving.value_server import ValueServer
from dvpo_service.serving.values import ResponseValues

NAME = "org/m"
COMPLETIONS, CHAT, VALUES = "/v1/completions", "/v1/chat/completions", "/v1/values"
A: dict[str, Any] = {"prompt": "a"}  # the smallest bodies of a completion and of a chat
TURN: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}


@dataclass
class FakePolicy:
    """Answers with ``n`` choices.

    ``hold`` keeps requests under way until it is set; ``lost`` fails as if no replica were left; ``cut`` ends a stream
    in its middle, as when its replica dies; ``fault`` is raised by every call.
    """

    hold: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    cut: bool = False
    fault: Exception | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hold.set()

    async def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        if self.fault:
            raise self.fault
        if self.lost:
            raise Unavailable("no answer within 1 s")
        if method is PolicyServer.ready:
            return "step-000007"
        if method is PolicyServer.models:
            return json.dumps({"object": "list", "data": [{"id": NAME, "object": "model"}]}).encode()
        self.seen.append(args[1])
        await self.hold.wait()
        choices = [
            {"index": i, "token_ids": [5, 6 + i, 1], "prompt_token_ids": [2, 3], "finish_reason": end}
            | ({"message": {"content": f"t{i}"}} if args[0] == "chat" else {"text": f"t{i}"})
            for i, end in zip(range(samples(args[1])), ["stop", "length"] * 50, strict=False)
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
    seen: list[Returned] = field(default_factory=list)

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


def samples(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    return prompts * (body.get("n") or 1)


def gateway(
    policy: FakePolicy | None = None, values: FakeValues | None = None, key: str | None = None, **limits: Any
) -> Gateway:
    digest = hashlib.sha256(key.encode()).hexdigest() if key else None
    return Gateway(policy or FakePolicy(), values, ServeConfig(**limits), NAME, digest)  # type: ignore[arg-type]


def client(*args: Any, **settings: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(gateway(*args, **settings).app()), base_url="http://test")


async def status(c: httpx.AsyncClient, path: str, body: Any, **headers: str) -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await c.post(path, content=content, headers=headers)
    return answer.status_code, answer.json().get("error", {}).get("message", "")
