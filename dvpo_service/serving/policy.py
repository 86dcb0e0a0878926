"""One replica of the policy: a vLLM engine behind vLLM's own OpenAI request handlers.

Every response is sampled by one version of the weights. An update waits for the responses under way, and requests that
arrive in the meantime wait for the update. The exception is a response that takes longer than
``serve.drain_timeout_s``: its last tokens come from the new weights.
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
from typing import Any

from dvpo_service.config import Config
from dvpo_service.errors import CheckpointError, one_line
from dvpo_service.models.engine import engine_settings, prepare_environment
from dvpo_service.models.fixed_sequences import FixedSequences, recorded
from dvpo_service.serving.requests import Kind
from dvpo_service.serving.weights_check import why_wrong

log = logging.getLogger(__name__)

# Chunks of a stream that arrive within this time are sent together: a reader sees no difference, and each message
# between processes costs as much as a token of a small model.
FLUSH_S = 0.02


@dataclass(frozen=True)
class Answer:
    """An HTTP answer.

    Attributes:
      status: the HTTP status.
      body: JSON.
      version: the version of the weights that sampled the response.
    """

    status: int
    body: bytes
    version: str


class PolicyServer:
    """A deployment that serves the weights that the last call of ``reconfigure`` named."""

    def __init__(self, config: Config, model_name: str):
        self.config = config
        self.model_name = model_name
        self.version = ""
        self.current: dict[str, Any] = {}
        self.refused: str | None = None
        self.fixed: FixedSequences | None = None  # what the engine's log-probs must be
        self.longest = 0  # tokens that the engine reads
        self.engine: Any = None
        self.handlers: dict[Kind, Any] = {}
        self._open = asyncio.Event()
        self._under_way = 0

    async def reconfigure(self, current: dict[str, Any]) -> None:
        """Load the policy folder ``current["policy"]``, and serve it as ``current["version"]``.

        The first call starts the engine; a later call loads the new weights into it. Weights with which the engine does
        not score like the exported model are refused: ``state`` says why, and the weights before are served on. Ray
        Serve calls this.

        Raises:
          CheckpointError, RuntimeError: the engine does not start, or not with these weights.
        """
        self.refused = None
        if current["version"] == self.version:
            return
        if self.engine is None:
            self.fixed = recorded(Path(current["policy"]))
            await self._start(current["policy"])
            if why := await self._why_wrong():
                raise RuntimeError(why)
        else:
            self.refused = await self._load(current["policy"])
        if self.refused is None:
            self.current, self.version = current, current["version"]
        self._open.set()

    async def state(self) -> dict[str, Any]:
        """Return what is served, as ``reconfigure`` got it, and why the last update was ``refused``, or None."""
        return {"served": self.current, "refused": self.refused}

    async def check_health(self) -> None:
        """Raise when the engine is dead; Ray Serve then replaces the replica."""
        if self.engine is not None:
            await self.engine.check_health()

    async def ready(self) -> str:
        """Return the version of the weights, when the engine is alive."""
        await self.check_health()
        return self.version

    async def models(self) -> bytes:
        """Return OpenAI's list of models as JSON."""
        return (await self.handlers["chat"].models.show_available_models()).model_dump_json().encode()

    async def complete(self, kind: Kind, body: dict[str, Any]) -> Answer:
        """Return the whole answer to a request that does not stream. ``body`` is a request of OpenAI's API."""
        async with self._weights() as version:
            response = await self._handle(kind, body)
            self._end_with_engine()
            error = getattr(response, "error", None)
            return Answer(error.code if error else 200, response.model_dump_json().encode(), version)

    async def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        """Yield an Answer, and then server-sent events as text.

        The Answer is the header: with status 200 its body is empty and events follow; any other status has the error as
        its body, and nothing follows.
        """
        async with self._weights() as version:
            response = await self._handle(kind, body)
            if error := getattr(response, "error", None):
                yield Answer(error.code, response.model_dump_json().encode(), version)
                return
            yield Answer(200, b"", version)
            async for text in together(response, FLUSH_S):
                self._end_with_engine()
                yield text

    def _end_with_engine(self) -> None:
        """End this process when its engine has died: a dead engine cannot be restarted.

        vLLM would answer with an error, or stream one as an event. When the process ends instead, the caller sees that
        the replica died, and calls another one if nothing has been streamed yet.
        """
        if self.engine.errored:
            os._exit(1)

    def __del__(self) -> None:
        """End the engine's own processes. Ray Serve calls this when a replica ends."""
        if self.engine is not None:
            self.engine.shutdown()

    async def _handle(self, kind: Kind, body: dict[str, Any]) -> Any:
        """Return what vLLM's handler returns: a response, an error response, or a stream of events."""
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
        except Exception as error:  # noqa: BLE001 - vLLM maps its errors to answers
            return create_error_response(error)

    @asynccontextmanager
    async def _weights(self) -> AsyncIterator[str]:
        """Keep the weights unchanged within the block, and yield their version."""
        while not self._open.is_set():
            await self._open.wait()
        self._under_way += 1
        try:
            yield self.version
        finally:
            self._under_way -= 1

    async def _load(self, policy: str) -> str | None:
        """Load new weights in place. A response that outlasts the drain time continues with the new weights.

        Returns:
          None, or why the weights are refused; then the ones before are loaded again.
        """
        before = self.fixed
        try:
            self.fixed = recorded(Path(policy))
        except CheckpointError as error:
            return str(error)
        self._open.clear()
        until = time.monotonic() + self.config.serve.drain_timeout_s
        while self._under_way and time.monotonic() < until:
            await asyncio.sleep(0.01)
        try:
            await self._reload(policy)
            why = await self._why_wrong()
            if why is None:
                return None
            self.fixed = before
            await self._reload(self.current["policy"])
            wrong_too = self.fixed is None or await self._why_wrong()
        except Exception:
            # The engine may hold a mix of old and new weights. A fresh replica starts with the new folder.
            log.exception("the weights of %s cannot be loaded; this replica ends", policy)
            os._exit(1)
        if wrong_too:
            # This model's weights cannot be changed in place, or the old ones are gone. A fresh engine may be right.
            log.error("%s; this replica ends, and a fresh one loads %s", why, policy)
            os._exit(1)
        return why

    async def _reload(self, policy: str) -> None:
        await self.engine.pause_generation(mode="keep", clear_cache=True)
        await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": policy})
        await self.engine.reset_prefix_cache()
        await self.engine.resume_generation()

    async def _why_wrong(self) -> str | None:
        return await why_wrong(self.engine, self.fixed, self.config.model.dtype, self.longest)

    async def _start(self, policy: str) -> None:
        prepare_environment()
        from starlette.datastructures import State
        from vllm import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        self.longest = limit = self.config.serve.max_model_len or context_length(policy)
        on_cpu = self.config.cluster.gpus_per_engine == 0
        # The options of vLLM's own server, with the defaults of its command line.
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
    """Return the number of tokens that the model in a policy folder can read."""
    settings = json.loads((Path(policy) / "config.json").read_text())
    settings = settings.get("text_config") or settings  # of a model that wraps a language model
    return int(settings.get("max_position_embeddings", 4096))


async def together(chunks: AsyncIterator[str], every_s: float) -> AsyncIterator[str]:
    """Yield the first chunk at once, and then, every ``every_s`` seconds, the chunks that arrived as one string.

    Raises what ``chunks`` raises, after the chunks before the error.
    """
    queue: asyncio.Queue[str | None] = asyncio.Queue()  # None marks the end

    async def collect() -> None:
        try:
            async for chunk in chunks:
                queue.put_nowait(chunk)
        finally:
            queue.put_nowait(None)

    collecting = asyncio.create_task(collect())
    ended = False
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
        await collecting  # raises the engine's error, if any
    finally:
        collecting.cancel()
