"""Calls survive the death of a replica, and streams do until their first event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.policy import together
from dvpo_service.serving.replicas import Replicas, Unavailable


class Items:
    """A fake of Ray Serve's response generator: an asynchronous iterator that can be cancelled.

    A float among the items is a pause in seconds, and an exception is raised.
    """

    def __init__(self, items: list[Any]):
        self.items = iter(items)

    async def __anext__(self) -> Any:
        try:
            item = next(self.items)
        except StopIteration:
            raise StopAsyncIteration from None
        if isinstance(item, float):
            await asyncio.sleep(item)
            return await self.__anext__()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None: ...


class Handle:
    """A fake deployment handle: each call has the next of the scripted outcomes."""

    def __init__(self, *outcomes: Any):
        self.outcomes = list(outcomes)
        self.calls = 0
        self.method = self
        self.events = self

    def options(self, stream: bool) -> Handle:
        return self

    def remote(self, *args: Any) -> Any:
        self.calls += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, list):
            return Items(outcome)

        async def call() -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            if isinstance(outcome, float):
                await asyncio.sleep(outcome)
            return outcome

        return call()


async def method() -> Any:
    """Stand for a method of a deployment; ``Handle`` has one of this name."""


async def events() -> AsyncIterator[Any]:
    """Stand for a method of a deployment that streams; ``Handle`` has one of this name."""
    yield


def replicas(*outcomes: Any, timeout_s: float = 5.0) -> Replicas:
    return Replicas(Handle(*outcomes), timeout_s=timeout_s)  # type: ignore[arg-type]


async def listed(items: AsyncIterator[Any]) -> list[Any]:
    return [i async for i in items]


def test_a_call_is_made_again_when_its_replica_dies() -> None:
    pool = replicas(ActorDiedError(), ActorDiedError(), "answer")
    assert asyncio.run(pool.call(method)) == "answer"
    assert pool.handle.calls == 3  # type: ignore[attr-defined]


def test_a_call_ends_at_its_deadline() -> None:
    with pytest.raises(Unavailable, match=r"within 0\.3 s"):
        asyncio.run(replicas(9.0, timeout_s=0.3).call(method))
    with pytest.raises(Unavailable):
        asyncio.run(replicas(*[ActorDiedError()] * 9, timeout_s=0.3).call(method))


def test_what_the_method_raises_comes_back_and_is_not_tried_again() -> None:
    cause = BadRequest("no", status=413)
    pool = replicas(RayTaskError("method", "trace", cause))
    with pytest.raises(BadRequest, match="no") as caught:
        asyncio.run(pool.call(method))
    assert caught.value.status == 413
    assert pool.handle.calls == 1  # type: ignore[attr-defined]


def test_a_stream_starts_again_until_its_first_event_and_no_later() -> None:
    died = ActorDiedError()
    assert asyncio.run(listed(replicas([died], ["ok", died], ["ok", "a", "b"]).stream(events))) == ["ok", "a", "b"]
    assert asyncio.run(listed(replicas(["only a header"]).stream(events))) == ["only a header"]

    async def scenario() -> None:
        stream = replicas(["ok", "a", died], ["ok", "again"]).stream(events)
        assert [await anext(stream), await anext(stream)] == ["ok", "a"]
        with pytest.raises(Unavailable, match="its replica died"):
            await anext(stream)

    asyncio.run(scenario())


def test_a_stream_ends_at_its_deadline() -> None:
    with pytest.raises(Unavailable, match="request_timeout_s"):
        asyncio.run(listed(replicas(["ok", 9.0], timeout_s=0.2).stream(events)))


def test_chunks_come_together_in_order_and_errors_come_through() -> None:
    async def chunks(fail: bool) -> AsyncIterator[str]:
        for i in range(50):
            yield f"{i},"
            await asyncio.sleep(0.001)
        if fail:
            raise ValueError("engine")

    parts = asyncio.run(listed(together(chunks(False), 0.02)))
    assert "".join(parts) == "".join(f"{i}," for i in range(50))
    assert parts[0] == "0,", "the first at once"
    assert len(parts) < 25
    with pytest.raises(ValueError, match="engine"):
        asyncio.run(listed(together(chunks(True), 0.02)))
