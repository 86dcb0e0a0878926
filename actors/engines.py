"""The pool of rollout engines: prompts in, samples out, in the prompts' order."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

import ray

from actors.placement import Placement
from actors.pool import Call, Pool, PoolError
from actors.rollout import RolloutEngine, Sampling
from actors.weight_transfer import Backend
from dvpo_service.config import Config
from dvpo_service.rewards.noise import sample_seed
from dvpo_service.types import Prompt, Sample

log = logging.getLogger(__name__)

# vLLM adds the sample's number to a request's seed; keep the sum within 32 bits.
SEED_RANGE = 2**31


class WarmEngines:
    """Engines that outlive a run, for the next one in this process: the trials of a sweep start sooner.

    A run pushes its own weights before it samples, so engines fit any run whose engine settings,
    architecture and tokenizer are those that they were built with.
    """

    def __init__(self) -> None:
        self._pool: EnginePool | None = None
        self._key = ""

    def lend(self, config: Config, model_path: str, backend: Backend, placement: Placement) -> EnginePool:
        """The engines kept, or new ones; they stay this object's."""
        key = engine_key(config, model_path, backend)
        if self._pool is None or key != self._key:
            self.drop()
            self._pool, self._key = EnginePool.spawn(config, model_path, backend, placement), key
        return self._pool

    def drop(self) -> None:
        """End the engines, as after a run that failed: who knows in what state it left them."""
        pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()


def engine_key(config: Config, model_path: str, backend: Backend) -> str:
    """Equal for runs whose engines are interchangeable. NCCL engines never are: they belong to a group of ranks."""
    names = (
        "num_engines",
        "tensor_parallel_size",
        "max_num_seqs",
        "enforce_eager",
        "kv_cache_gib",
        "generate_timeout_s",
    )
    settings = config.rollout.model_dump(include={*names, "gpu_memory_utilization"})
    parts = [str(settings), config.model.dtype, str(config.max_model_len), backend]
    folder = Path(model_path)
    if backend != "safetensors" or not folder.is_dir():
        return uuid.uuid4().hex
    digest = hashlib.sha256("|".join(parts).encode())
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            digest.update((folder / file).read_bytes())
    return digest.hexdigest()


class EnginePool(Pool):
    """vLLM engines that share the prompts of a batch evenly."""

    @classmethod
    def spawn(cls, config: Config, model_path: str, backend: Backend, placement: Placement) -> EnginePool:
        actor = ray.remote(RolloutEngine)
        return cls(
            "rollout",
            [
                actor.options(max_concurrency=1000, **placement.options("rollout", i)).remote(
                    config, model_path, backend
                )
                for i in range(config.rollout.num_engines)
            ],
            timeout_s=config.rollout.generate_timeout_s,
        )

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, run_seed: int, step: int
    ) -> list[list[Sample]]:
        """``sampling.n`` samples per prompt. The same seed and step sample the same tokens."""
        seeds = [sample_seed(run_seed, step, p.index, 0) % SEED_RANGE for p in prompts]
        count = len(self.actors)
        refs = [
            actor.generate.remote(list(prompts[i::count]), sampling, seeds[i::count])
            for i, actor in enumerate(self.actors)
        ]
        shares = Call(self.name, "generate", refs, self.timeout_s).result()
        return [shares[i % count][i // count] for i in range(len(prompts))]

    def shutdown(self) -> None:
        """Let every engine end its own processes before its actor goes."""
        try:
            self.call("stop", timeout_s=30)
        except PoolError as error:
            log.warning("an engine did not end by itself and is killed: %s", error)
        super().shutdown()
