"""A vLLM engine as an actor: sampling with log-probs, and weights from the trainer."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import ray

from actors.cluster.pool import EngineLost
from actors.cluster.shm_cleanup import remove_mapped_names
from dvpo_service.config import Backend, Config
from dvpo_service.errors import one_line
from dvpo_service.models.engine import engine_settings, prepare_environment
from dvpo_service.roles import Engine
from dvpo_service.types import Prompt, Sample, Sampling


@contextmanager
def _vllm_alive() -> Iterator[None]:
    """vLLM's word for its death in ours, which can be sent between processes."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLost(f"EngineDeadError: {error}") from None


class VllmEngine(Engine):
    """One ``AsyncLLM``. Its weights are those of ``weight_version``; -1 is the model folder's own.

    Every method but ``start`` and ``stop`` raises EngineLost when vLLM's processes are gone. ``roles.Engine`` says what
    each does.
    """

    transfers: ClassVar[tuple[Backend, ...]] = ("safetensors", "nccl", "ipc")

    def __init__(self, config: Config, model_path: str, backend: Backend):
        self.config, self.model_path, self.backend = config, model_path, backend
        self.weight_version = -1
        self.engine: Any = None
        self.updating = False  # between the start and the finish of a weight update
        self.in_flight = config.rollout.max_staleness > 0  # weights may change in the middle of a response

    async def start(self) -> None:
        """Load the model; returns when the engine can serve, at once if it does already."""
        if self.engine is not None:
            return
        prepare_environment()
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())  # else the default route's
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        config = self.config
        args = AsyncEngineArgs(
            **engine_settings(config, self.model_path, config.max_model_len, on_cpu=self.backend == "safetensors"),
            # Log-probs of the distribution sampled from (after temperature), as the trainer computes them.
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=self.backend),
        )
        try:
            self.engine = AsyncLLM.from_engine_args(args)
        except (ValueError, RuntimeError) as error:
            # vLLM's own errors (pydantic's) cannot be sent between processes.
            raise RuntimeError(f"vLLM did not start: {one_line(error, 500)}") from None
        remove_mapped_names()

    async def generate(self, prompts: list[Prompt], sampling: Sampling, seeds: list[int]) -> list[list[Sample]]:
        """``sampling.n`` samples for each prompt, in the prompts' order."""
        with _vllm_alive():
            return await asyncio.gather(*(self._one(p, sampling, s) for p, s in zip(prompts, seeds, strict=True)))

    async def heartbeat(self) -> None:
        """Returns when the engine's own process has answered between two of its steps."""
        with _vllm_alive():
            await self.engine.check_health()
            await self.engine.is_paused()

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of every token but the first of given sequences, under the engine's weights."""
        from vllm import SamplingParams

        # prompt_logprobs bypasses the prefix cache, so this reads the weights that are loaded now.
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)

        async def one(tokens: list[int]) -> list[float]:
            output = await self._final({"prompt_token_ids": tokens}, params)
            return [p[t].logprob for t, p in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]

        with _vllm_alive():
            return await asyncio.gather(*(one(tokens) for tokens in sequences))

    # vLLM's weight-transfer control plane; the trainer's EngineClient calls these.

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        with _vllm_alive():
            await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def shutdown_weight_transfer_engine(self) -> None:
        with _vllm_alive():
            await self._end_torn_update()
            await self.engine.shutdown_weight_transfer_engine()

    async def start_weight_update(self) -> None:
        with _vllm_alive():
            await self._end_torn_update()
            self.updating = True
            if self.in_flight:
                # What is being generated goes on from where it is; the cache of it is computed anew.
                await self.engine.pause_generation(mode="keep", clear_cache=True)
            await self.engine.start_weight_update()

    async def sees(self, path: str, target: str) -> bool:
        """Whether ``path``, a link to ``target`` on the sender's host, is the same here."""
        return os.path.islink(path) and os.readlink(path) == target

    async def update_weights(self, update_info: Any, content: np.ndarray | None = None) -> None:
        """``content`` [bytes]: the update's file, where this engine is on another host than the sender."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with _vllm_alive():
            if content is None:
                await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
                return
            with os.fdopen(os.memfd_create("dvpo-received"), "wb") as file:
                content.tofile(file)
                file.flush()
                here = {"path": f"/proc/{os.getpid()}/fd/{file.fileno()}"}
                await self.engine.update_weights(WeightTransferUpdateRequest(update_info=here))

    async def finish_weight_update(self) -> None:
        with _vllm_alive():
            await self.engine.finish_weight_update()
            self.updating = False

    async def _end_torn_update(self) -> None:
        """The trainer died in the middle of an update; the next one replaces all of it."""
        if self.updating:
            await self.engine.finish_weight_update()
            self.updating = False

    async def set_version(self, version: int) -> int:
        """Acknowledge weights ``version``: cached prefixes were computed with older ones."""
        with _vllm_alive():
            await self.engine.reset_prefix_cache()
            self.weight_version = version
            if self.in_flight:
                await self.engine.resume_generation()
        return version

    async def stop(self) -> None:
        """End the engine's own processes."""
        if self.engine is not None:
            # Without a GPU it holds nothing that the kernel does not take back, and its own way out takes 3 s.
            self.engine.shutdown(timeout=0 if self.backend == "safetensors" else None)
            self.engine = None

    async def _one(self, prompt: Prompt, sampling: Sampling, seed: int) -> list[Sample]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = sampling.temperature == 0
        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=None if greedy else seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        version = self.weight_version
        output = await self._final({"prompt_token_ids": list(prompt.token_ids)}, params)
        return [
            Sample(
                prompt_index=prompt.index,
                sample_index=i,
                token_ids=tuple(c.token_ids),
                logprobs=tuple(lp[t].logprob for t, lp in zip(c.token_ids, c.logprobs, strict=True)),
                text=c.text,
                finish_reason="stop" if c.finish_reason == "stop" else "length",
                weight_version=version,
            )
            for i, c in enumerate(sorted(output.outputs, key=lambda c: c.index))
        ]

    async def _final(self, prompt: dict[str, Any], params: Any) -> Any:
        outputs = [o async for o in self.engine.generate(prompt, params, request_id=uuid.uuid4().hex)]
        return outputs[-1]
