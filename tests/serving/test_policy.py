"""A policy replica and its engine: updates wait for responses, wrong weights are refused, a dead engine ends it."""

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

from dvpo_service.models.fixed_sequences import FILE, FixedSequences
from dvpo_service.serving.policy import PolicyServer
from tests.builders import make_config


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
