"""Measure what updatable weights on CPU cost in generation speed: packed against plain linear layers.

``python -m tests.bench.bench_generation [hidden layers]`` prints one JSON object: tokens/s of the same model and
prompts, first with vLLM's own packed layers, which new weights never reach, and then with our plain ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, TOKENS, ROUNDS = 32, 8, 24, 5


def main() -> None:
    from dvpo_service.models.small import save_small_model

    hidden, layers = (int(a) for a in sys.argv[1:3]) if len(sys.argv) > 2 else (96, 3)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_small_model(
            model, hidden_size=hidden, num_layers=layers, num_heads=hidden // 32, max_positions=128, seed=0
        )
        size = (model / "model.safetensors").stat().st_size // 4
        speeds = {name: run(model, plugins) for name, plugins in (("packed", ""), ("plain", None))}
    ratio = round(speeds["plain"] / speeds["packed"], 3)
    print(json.dumps({"parameters": size, "tokens_per_s": speeds, "plain_over_packed": ratio}, indent=2))


def run(model: Path, plugins: str | None) -> float:
    """Return the median tokens/s, measured in a new process. ``plugins=""`` keeps our plugin out of the engine."""
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-m", "tests.bench.bench_generation", "--serve", str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=True)
    return round(float(done.stdout.strip().splitlines()[-1]))


async def serve(model: str) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model, dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=2**29
        )
    )
    params = SamplingParams(n=SAMPLES, temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)

    async def one(i: int, r: int) -> int:
        prompt: Any = {"prompt_token_ids": [2, 20 + i % 10, 21, 14, 22 + r, 32, 3]}
        outputs = [o async for o in engine.generate(prompt, params, request_id=f"{r}-{i}")]
        return sum(len(c.token_ids) for c in outputs[-1].outputs)

    speeds = []
    for r in range(ROUNDS + 1):
        start = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(i, r) for i in range(PROMPTS))))
        speeds.append(tokens / (time.perf_counter() - start))
    engine.shutdown()
    print(statistics.median(speeds[1:]))  # the first round warms up


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve(sys.argv[2]))
    else:
        main()
