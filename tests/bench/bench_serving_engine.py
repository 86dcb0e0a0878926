"""The bare engine of bench_serving, with the server's settings.

It reads lines of JSON, lists of (prompt, length), and prints the speed of each.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path

from dvpo_service.config import load_config
from dvpo_service.models.engine import engine_settings, prepare_environment
from dvpo_service.runs.settings import CONFIG_FILE
from dvpo_service.serving.policy import context_length
from tests.bench.bench_serving import at_once


async def main(folder: str) -> None:
    prepare_environment()
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    config = load_config(str(Path(folder) / CONFIG_FILE))
    settings = engine_settings(config, folder, context_length(folder), on_cpu=True)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    count = 0

    async def ask(prompt: str, tokens: int) -> None:
        nonlocal count
        count += 1
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
        async for _ in engine.generate(prompt, params, request_id=str(count)):
            pass

    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        took = await at_once([partial(ask, *a) for a in asked])
        print(f"tokens/s {sum(tokens for _, tokens in asked) / took}", flush=True)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
