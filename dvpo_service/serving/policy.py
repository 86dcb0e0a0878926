"""One replica of the policy: a vLLM engine behind vLLM's own OpenAI request handlers.

A response is made by one version of the weights: an update waits for the responses under way, and requests that
arrive meanwhile wait for the update.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dvpo_service.config import Config
from dvpo_service.errors import one_line
from dvpo_service.models.engine import engine_settings, prepare_environment

log = logging.getLogger(__name__)

Kind = Literal["chat", "completion"]

# Chunks of a stream are sent together when they come faster than this: a person sees no difference, and each message
# between processes costs as much as a token of a small model.
FLUSH_S = 0.02


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: ``body`` is JSON. ``version`` names the weights that made it."""

    status: int
    body: bytes
    version: str


class PolicyServer:
    """Serves the weights that ``reconfigure`` last named."""

    def __init__(self, config: Config, model_name: str):
        self.config, self.model_name = config, model_name
        self.version = ""
        self.engine: Any = None
        self.handlers: dict[Kind, Any] = {}
        self._open = asyncio.Event()
        self._under_way = 0

    async def reconfigure(self, current: dict[str, str]) -> None:
        """Serve the policy folder ``current["policy"]`` as ``current["version"]``: start with it, or change to it."""
        if current["version"] == self.version:
            return
        if self.engine is None:
            await self._start(current["policy"])
        else:
            await self._load(current["policy"])
        self.version = current["version"]
        self._open.set()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self.engine is not None:
            await self.engine.check_health()

    async def ready(self) -> str:
        """The version served now."""
        await self.check_health()
        return self.version

    async def models(self) -> bytes:
        return (await self.handlers["chat"].models.show_available_models()).model_dump_json().encode()

    async def complete(self, kind: Kind, body: dict[str, Any]) -> Answer:
        """The whole answer to a request that does not stream."""
        async with self._weights() as version:
            made = await self._handle(kind, body)
            self._end_with_engine()
            error = getattr(made, "error", None)
            return Answer(error.code if error else 200, made.model_dump_json().encode(), version)

    async def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        """First an Answer that says how it went (200: without a body), then server-sent events as text."""
        async with self._weights() as version:
            made = await self._handle(kind, body)
            if error := getattr(made, "error", None):
                yield Answer(error.code, made.model_dump_json().encode(), version)
                return
            yield Answer(200, b"", version)
            async for text in together(made, FLUSH_S):
                self._end_with_engine()
                yield text

    def _end_with_engine(self) -> None:
        """End this process with its engine, which nothing brings back.

        vLLM would answer with an error, or with an event that says so. The caller sees a replica that died instead,
        and asks another one where nothing has been streamed yet.
        """
        if self.engine.errored:
            os._exit(1)

    def __del__(self) -> None:
        """Serve calls this when a replica ends: the engine's own processes go with it."""
        if self.engine is not None:
            self.engine.shutdown()

    async def _handle(self, kind: Kind, body: dict[str, Any]) -> Any:
        """What vLLM's handler returns: a response, an error response, or a stream of events."""
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

        try:
            if kind == "chat":
                return await self.handlers[kind].create_chat_completion(ChatCompletionRequest(**body))
            return await self.handlers[kind].create_completion(CompletionRequest(**body))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            return create_error_response("; ".join(lines))
        except Exception as error:  # noqa: BLE001 - vLLM's own mapping of its errors to answers
            return create_error_response(error)

    @asynccontextmanager
    async def _weights(self) -> AsyncIterator[str]:
        """Hold the weights still; gives their version."""
        while not self._open.is_set():
            await self._open.wait()
        self._under_way += 1
        try:
            yield self.version
        finally:
            self._under_way -= 1

    async def _load(self, policy: str) -> None:
        """New weights, in place. What takes longer than the drain time goes on with the new weights."""
        self._open.clear()
        until = time.monotonic() + self.config.serve.drain_timeout_s
        while self._under_way and time.monotonic() < until:
            await asyncio.sleep(0.01)
        try:
            await self.engine.pause_generation(mode="keep", clear_cache=True)
            await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": policy})
            await self.engine.reset_prefix_cache()
            await self.engine.resume_generation()
        except Exception:
            # Half of the old weights and half of the new would answer: a fresh replica starts with the new folder.
            log.exception("the weights of %s cannot be loaded; this replica ends", policy)
            os._exit(1)

    async def _start(self, policy: str) -> None:
        prepare_environment()
        from starlette.datastructures import State
        from vllm import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        limit = self.config.serve.max_model_len or context_length(policy)
        on_cpu = self.config.cluster.gpus_per_engine == 0
        # What vLLM's own server takes from its command line, with its defaults.
        options = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        vars(options).update(engine_settings(self.config, policy, limit, on_cpu=on_cpu))
        options.served_model_name = [self.model_name]
        try:
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(options))
        except (ValueError, RuntimeError) as error:  # vLLM's own errors cannot be sent between processes
            raise RuntimeError(f"vLLM did not start: {one_line(error, 500)}") from None
        state = State()
        await init_app_state(self.engine, state, options, await self.engine.get_supported_tasks())
        self.handlers = {"chat": state.openai_serving_chat, "completion": state.openai_serving_completion}


def context_length(policy: str) -> int:
    """Tokens that the model in a policy folder reads."""
    settings = json.loads((Path(policy) / "config.json").read_text())
    return int(settings.get("max_position_embeddings", 4096))


async def together(chunks: AsyncIterator[str], every_s: float) -> AsyncIterator[str]:
    """The first chunk at once, then what has come in each ``every_s`` seconds as one string."""
    queue: asyncio.Queue[str | None] = asyncio.Queue()  # None is the end

    async def collect() -> None:
        try:
            async for chunk in chunks:
                queue.put_nowait(chunk)
        finally:
            queue.put_nowait(None)

    collecting, ended = asyncio.create_task(collect()), False
    try:
        while not ended:
            parts = [await queue.get()]
            while not queue.empty():
                parts.append(queue.get_nowait())
            ended = parts[-1] is None
            if text := "".join(p for p in parts if p is not None):
                yield text
            if not ended:
                await asyncio.sleep(every_s)
        await collecting  # an error of the engine is the reader's
    finally:
        collecting.cancel()
