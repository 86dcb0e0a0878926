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
    """Turn vLLM's EngineDeadError into EngineLost, which can be sent between processes."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLost(f"EngineDeadError: {error}") from None


class VllmEngine(Engine):
    """A rollout engine with one vLLM ``AsyncLLM``; ``roles.Engine`` says what each method does.

    Every method except ``start`` and ``stop`` raises EngineLost when vLLM's processes are gone.

    Args:
      model_path: the folder of the model.
      backend: the weight transfer that the engine prepares for. "safetensors" also means that it runs on the CPU.
    """

    transfers: ClassVar[tuple[Backend, ...]] = ("safetensors", "nccl", "ipc")

    def __init__(self, config: Config, model_path: str, backend: Backend):
        self.config, self.model_path, self.backend = config, model_path, backend
        self.weight_version = -1
        self.engine: Any = None
        self.updating = False  # a weight update has started and not finished
        self.in_flight = config.rollout.max_staleness > 0  # weights may change during a response

    async def start(self) -> None:
        """Load the model; return when the engine can serve, at once if it does already.

        Raises:
          RuntimeError: vLLM did not start.
        """
        if self.engine is not None:
            return
        prepare_environment()
        # vLLM itself would take the address of the default route.
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        config = self.config
        args = AsyncEngineArgs(
            **engine_settings(config, self.model_path, config.max_model_len, on_cpu=self.backend == "safetensors"),
            # Log-probs of the distribution that is sampled from (after temperature), as the trainer computes them.
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
        """Return ``sampling.n`` samples for each prompt, in the prompts' order; ``seeds`` has one seed per prompt."""
        with _vllm_alive():
            return await asyncio.gather(*(self._one(p, sampling, s) for p, s in zip(prompts, seeds, strict=True)))

    async def heartbeat(self) -> None:
        """Return when vLLM's engine process has answered, which it does between two of its steps."""
        with _vllm_alive():
            await self.engine.check_health()
            await self.engine.is_paused()

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-probs of every token but the first of given sequences, under the engine's weights."""
        from vllm import SamplingParams

        # prompt_logprobs bypasses the prefix cache, so this reads the weights that are loaded now.
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)

        async def one(tokens: list[int]) -> list[float]:
            output = await self._final({"prompt_token_ids": tokens}, params)
            return [p[t].logprob for t, p in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]

        with _vllm_alive():
            return await asyncio.gather(*(one(tokens) for tokens in sequences))

    # The next methods are vLLM's weight-transfer control plane; the trainer's EngineClient calls them.

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join vLLM's weight transfer with the trainer that ``init_info`` describes."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        with _vllm_alive():
            await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def shutdown_weight_transfer_engine(self) -> None:
        """Leave the weight transfer, also in the middle of an update that the trainer did not finish."""
        with _vllm_alive():
            await self._end_torn_update()
            await self.engine.shutdown_weight_transfer_engine()

    async def start_weight_update(self) -> None:
        """Prepare for an update. With ``in_flight``, generation pauses until ``set_version``."""
        with _vllm_alive():
            await self._end_torn_update()
            self.updating = True
            if self.in_flight:
                # Responses under way continue from their last token afterwards; their KV cache is computed again.
                await self.engine.pause_generation(mode="keep", clear_cache=True)
            await self.engine.start_weight_update()

    async def sees(self, path: str, target: str) -> bool:
        """Return whether ``path``, a link to ``target`` on the sender's host, is the same link on this host."""
        return os.path.islink(path) and os.readlink(path) == target

    async def update_weights(self, update_info: Any, content: np.ndarray | None = None) -> None:
        """Load new weights in place.

        Args:
          update_info: vLLM's description of the update; for "safetensors" the ``path`` of a file, and whether it is the
            ``last``.
          content: the file's bytes [size] uint8, where this engine is on another host than the sender.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with _vllm_alive():
            if content is None:
                await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
                return
            with os.fdopen(os.memfd_create("dvpo-received"), "wb") as file:
                content.tofile(file)
                file.flush()
                here = update_info | {"path": f"/proc/{os.getpid()}/fd/{file.fileno()}"}
                await self.engine.update_weights(WeightTransferUpdateRequest(update_info=here))

    async def finish_weight_update(self) -> None:
        """End the update, whose weights have all arrived."""
        with _vllm_alive():
            await self.engine.finish_weight_update()
            self.updating = False

    async def _end_torn_update(self) -> None:
        """End an update that a trainer left unfinished when it died. The next update replaces all weights."""
        if self.updating:
            await self.engine.finish_weight_update()
            self.updating = False

    async def set_version(self, version: int) -> int:
        """Acknowledge weights ``version``: drop the prefix cache, which older weights computed; resume generation."""
        with _vllm_alive():
            await self.engine.reset_prefix_cache()
            self.weight_version = version
            if self.in_flight:
                await self.engine.resume_generation()
        return version

    async def stop(self) -> None:
        """End the engine's own processes."""
        if self.engine is not None:
            # Without a GPU the kernel frees everything that the engine holds, and an orderly shutdown takes 3 s.
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
