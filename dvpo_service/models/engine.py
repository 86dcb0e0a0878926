"""The settings of a vLLM engine, for rollouts and for serving."""

from __future__ import annotations

import os
from typing import Any

from dvpo_service.config import Config


def prepare_environment() -> None:
    """Set vLLM's environment variables where they are unset.

    Call this before vLLM is imported, because vLLM reads the variables at import. vLLM must not pin cores, because the
    actor sets its own number of threads.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_settings(config: Config, model: str, max_model_len: int, *, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's ``AsyncEngineArgs``.

    Args:
      model: a folder or hub name.
      max_model_len: the longest sequence, prompt and response, in tokens.
      on_cpu: whether the engine runs on a CPU.
    """
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
        "seed": config.trainer.seed % 2**32,  # numpy, which vLLM seeds with it, takes no larger one
        "disable_log_stats": True,
    }
    if not on_cpu:
        return settings | {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    return settings | {
        "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
        # A seeded request whose prompt is split into chunks kills vLLM 0.32 on CPU ("CPU Generator does not use
        # offset"), so prompts are not split.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, max_model_len),
    }


def _executor(ranks: int, *, on_cpu: bool) -> Any:
    """Return vLLM's executor backend. Processes of its own ("mp") run in this actor's bundle, without Ray.

    One CPU rank needs no process beside the engine's own. vLLM would still start one, whose threads it can bind to
    cores. Here the actor sets the threads, and the two processes would only spin on a message queue, waiting for each
    other.
    """
    if ranks > 1 or not on_cpu:
        return "mp" if ranks > 1 else None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor
