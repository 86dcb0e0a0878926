"""How this service sets a vLLM engine up, for rollouts and for serving alike."""

from __future__ import annotations

import os
from typing import Any

from dvpo_service.config import Config


def prepare_environment() -> None:
    """Before vLLM is imported, which reads these then. The actor owns its thread count; vLLM must not pin cores."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_settings(config: Config, model: str, max_model_len: int, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs`` for ``model``, a folder or hub name."""
    rollout = config.rollout
    settings: dict[str, Any] = {
        "model": model,
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": _executor(rollout.tensor_parallel_size, on_cpu=on_cpu),
        "max_model_len": max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager,
        "enable_prefix_caching": True,
        "seed": config.trainer.seed,
        "disable_log_stats": True,
    }
    if not on_cpu:
        return settings | {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    return settings | {
        "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
        # A seeded request whose prompt is cut in two kills vLLM 0.32 on CPU ("CPU Generator does not use
        # offset"), so prompts are taken whole.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
    }


def _executor(ranks: int, *, on_cpu: bool) -> Any:
    """What runs the model: its own processes (``mp``) are in this actor's bundle, so that vLLM asks Ray for none.

    One CPU rank needs no process beside the engine's own. vLLM would start one all the same, for the threads it
    binds there; here the actor owns its threads, and the two would spin on a message queue, waiting for each other.
    """
    if ranks > 1 or not on_cpu:
        return "mp" if ranks > 1 else None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor
