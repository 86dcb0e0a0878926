"""Calls survive the death of a replica, and streams do until their first event; a policy replica and its engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from dvpo_service.models.fixed_sequences import FILE, FixedSequences
from dvpo_service.serving.errors import BadRequest
from dvpo_service.serving.policy import PolicyServer, together
from dvpo_service.serving.replicas import Replicas, Unavailable
from tests.builders import make_config


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


@dataclass
class Scored:
    prompt_logprobs: list[Any]


class FakeEngine:
    """Scores every token with the number in the name of the folder that it has loaded, plus what its memory is off by.

    ``off`` is added after every load in place, as when a layout of the weights is not that of a file.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errored = self.refuses = False
        self.score, self.off = 0.0, 0.0

    async def generate(self, prompt: dict[str, list[int]], settings: Any, request_id: str) -> AsyncIterator[Scored]:
        rows: list[Any] = [{token: SimpleNamespace(logprob=self.score)} for token in prompt["prompt_token_ids"]]
        yield Scored([None, *rows[1:]])

    async def pause_generation(self, **kwargs: Any) -> None:
        self.calls.append("pause")

    async def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        if self.refuses:
            raise ValueError("size mismatch")
        self.calls.append(f"{method} {kwargs['weights_path']}")
        with suppress(ValueError):
            self.score = float(Path(kwargs["weights_path"]).name) + self.off

    async def reset_prefix_cache(self) -> None: ...

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    def shutdown(self) -> None: ...


@pytest.mark.parametrize("drain_timeout_s", [5.0, 0.1])
def test_new_weights_wait_for_responses_under_way_and_new_requests_for_the_weights(drain_timeout_s: float) -> None:
    async def scenario() -> None:
        config = make_config("m").model_copy(update={"serve": make_config("m").serve})
        config = config.model_copy(
            update={"serve": config.serve.model_copy(update={"drain_timeout_s": drain_timeout_s})}
        )
        engine = FakeEngine()
        server = PolicyServer(config, "m")
        server.engine = engine
        server.version = "old"
        server._open.set()
        seen = []

        async def request(seconds: float) -> None:
            async with server._weights() as version:
                await asyncio.sleep(seconds)
                seen.append((version, list(engine.calls)))

        running = asyncio.create_task(request(0.5))
        await asyncio.sleep(0.01)
        update = asyncio.create_task(server.reconfigure({"policy": "p", "version": "new"}))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(request(0.0))
        await asyncio.gather(running, update, waiting)
        drained = [v for v, calls in seen if not calls]
        if drain_timeout_s > 0.5:
            assert drained == ["old"], "the old weights until the response was whole"
        assert ("new", ["pause", "reload_weights p", "resume"]) in seen
        await server.reconfigure({"policy": "p", "version": "new"})
        assert engine.calls == ["pause", "reload_weights p", "resume"], "the same version again changes nothing"

    asyncio.run(scenario())


class Exited(BaseException):
    """Raised where the process would end."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> PolicyServer:
    def exit_now(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr("os._exit", exit_now)
    server = PolicyServer(make_config("m"), "m")
    server.engine = FakeEngine()
    server.version = "old"
    server.longest = 16
    server._open.set()
    return server


@pytest.mark.parametrize("events_before", [0, 2])
def test_a_replica_ends_with_its_engine_before_the_error_is_an_event(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch, events_before: int
) -> None:
    """When its engine dies, vLLM's stream goes on with an event that says what happened."""

    async def handle(kind: str, body: dict[str, Any]) -> AsyncIterator[str]:
        async def events() -> AsyncIterator[str]:
            for i in range(events_before):
                yield f"data: {i}"
                await asyncio.sleep(0.1)
            server.engine.errored = True
            yield "data: error"

        return events()

    monkeypatch.setattr(server, "_handle", handle)
    seen: list[Any] = []

    async def read() -> None:
        async for item in server.stream("chat", {}):
            seen.append(item)

    with pytest.raises(Exited):
        asyncio.run(read())
    assert seen[1:] == [f"data: {i}" for i in range(events_before)], "after the header"


def test_a_replica_whose_weights_are_half_loaded_ends(server: PolicyServer) -> None:
    server.engine.refuses = True
    with pytest.raises(Exited):
        asyncio.run(server.reconfigure({"policy": "p", "version": "new"}))
    assert server.version == "old"


def folder(parent: Path, name: str, log_prob: float) -> str:
    """Return a folder that records ``log_prob`` for every token; its weights give the number in its name."""
    (parent / name).mkdir()
    (parent / name / FILE).write_text(json.dumps({"token_ids": [[5, 6, 7]], "log_probs": [[log_prob] * 2]}))
    return str(parent / name)


def update(server: PolicyServer, tmp_path: Path, *, new: str) -> None:
    """Have a server that serves the folder "-1" as "old" load the folder ``new``, and ask for the old one again."""
    server.current = {"policy": folder(tmp_path, "-1", -1.0), "version": "old"}
    server.fixed = FixedSequences([[5, 6, 7]], [[-1.0] * 2])
    asyncio.run(server.reconfigure({"policy": new, "version": "new"}))


def test_weights_that_score_as_recorded_are_served(server: PolicyServer, tmp_path: Path) -> None:
    update(server, tmp_path, new=folder(tmp_path, "-2", -2.0))
    state = asyncio.run(server.state())
    assert (server.version, state["served"]["version"], state["refused"]) == ("new", "new", None)


@pytest.mark.parametrize("recorded", ["another model's", "damaged"])
def test_weights_that_do_not_are_refused_in_words_and_the_old_ones_served_on(
    server: PolicyServer, tmp_path: Path, recorded: str
) -> None:
    new = folder(tmp_path, "-2", -2.1)
    if recorded == "damaged":
        (Path(new) / FILE).write_text("{")
    update(server, tmp_path, new=new)
    state = asyncio.run(server.state())
    assert (server.version, state["served"]["version"]) == ("old", "old")
    assert ("is damaged" if recorded == "damaged" else "differ by 0.1 nats") in state["refused"]
    assert server.engine.score == (0.0 if recorded == "damaged" else -1.0), "the old weights, in the engine too"
    assert server._open.is_set()
    asyncio.run(server.reconfigure(server.current))
    assert asyncio.run(server.state())["refused"] is None


def test_an_engine_whose_weights_cannot_be_changed_in_place_is_replaced(server: PolicyServer, tmp_path: Path) -> None:
    """Mixtures of experts on CPUs: after a load in place of the right weights, vLLM computes something else."""
    server.engine.off = 3.0
    with pytest.raises(Exited):
        update(server, tmp_path, new=folder(tmp_path, "-2", -2.0))
    assert server.version == "old"


def test_an_engine_that_starts_wrong_is_never_open(
    server: PolicyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = PolicyServer(server.config, "m")
    fresh.longest = 16

    async def start(policy: str) -> None:
        fresh.engine = FakeEngine()

    monkeypatch.setattr(fresh, "_start", start)
    with pytest.raises(RuntimeError, match=r"differ by 2 nats on average .* in float32, 0\.001 is allowed"):
        asyncio.run(fresh.reconfigure({"policy": folder(tmp_path, "-2", -2.0), "version": "new"}))
    assert not fresh._open.is_set()
