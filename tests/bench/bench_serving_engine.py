"""The bare engine of bench_serving: one line of JSON in (prompts, tokens), one line with its speed out."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial

from tests.bench.bench_serving import at_once


async def main(model: str) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype="float32",
            max_model_len=128,
            enforce_eager=True,
            kv_cache_memory_bytes=2**30,
            enable_chunked_prefill=False,
            max_num_batched_tokens=4096,
            disable_log_stats=True,
        )
    )
    count = 0

    async def ask(prompt: str, params: SamplingParams) -> None:
        nonlocal count
        count += 1
        async for _ in engine.generate(prompt, params, request_id=str(count)):
            pass

    while line := await asyncio.to_thread(sys.stdin.readline):
        prompts, tokens = json.loads(line)
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
        took = await at_once([partial(ask, p, params) for p in prompts])
        print(f"tokens/s {tokens * len(prompts) / took}", flush=True)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
