"""Measure what HTTP, Ray Serve and the gateway cost: throughput of server and bare engine on the same prompts.

``python -m tests.bench.bench_serving [--requests 512] [--tokens 96] [--range-ratio 0.5]`` prints one JSON object.
Engine and server run side by side and are measured in turn, 64 requests at a time. The server's figure includes the
client's own work. Response lengths are uniform from ``tokens * (1 - ratio)`` to ``tokens * (1 + ratio)``, as in vLLM's
own benchmark. With a ratio of 0 all responses have one length, so that 64 of them end in the same step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.serving.server import ServerProcess, make_export

CLIENTS, ROUNDS = 64, 5


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--requests", type=int, default=512)
    options.add_argument("--tokens", type=int, default=96)
    options.add_argument("--range-ratio", type=float, default=0.5)
    given = options.parse_args(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        export = make_export(Path(folder) / "export", hidden_size=96, num_layers=3, num_heads=3, max_positions=256)
        with ServerProcess(export.folder) as server, Engine(export.folder) as engine:
            rounds = [(engine.round(given), asyncio.run(load(server.url, given))) for _ in range(ROUNDS + 1)]
    bare = [tokens_per_s for tokens_per_s, _ in rounds[1:]]  # the first round warms up
    served = [load_figures for _, load_figures in rounds[1:]]
    print(
        json.dumps(
            {
                "clients": CLIENTS,
                "requests": given.requests,
                "tokens_per_request": given.tokens,
                "range_ratio": given.range_ratio,
                "bare_tokens_per_s": [round(x) for x in bare],
                "served_tokens_per_s": [round(x["tokens_per_s"]) for x in served],
                "errors": sum(x["errors"] for x in served),
                "p50_ms": round(statistics.median(x["p50_ms"] for x in served)),
                "p99_ms": round(statistics.median(x["p99_ms"] for x in served)),
                "served_over_bare": round(
                    statistics.median(s["tokens_per_s"] / b for b, s in zip(bare, served, strict=True)), 3
                ),
            },
            indent=2,
        )
    )


def asked(given: argparse.Namespace) -> list[tuple[str, int]]:
    """Return prompts and the number of tokens to generate for each. Every call returns the same."""
    rng = random.Random(0)
    spread = given.tokens * given.range_ratio
    lengths = [round(rng.uniform(given.tokens - spread, given.tokens + spread)) for _ in range(given.requests)]
    return [(f"{i % 89 + 10}+{i * 7 % 89 + 10}=", n) for i, n in enumerate(lengths)]


async def at_once(asks: list[Callable[[], Awaitable[None]]]) -> float:
    """Make all requests, ``CLIENTS`` at a time, and return the seconds that they took."""
    waiting = iter(asks)

    async def client() -> None:
        for ask in waiting:
            await ask()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - start


async def load(url: str, given: argparse.Namespace) -> dict[str, float]:
    """Send all requests to the server, and return its throughput, errors and latencies."""
    import aiohttp

    seconds: list[float] = []
    tokens = errors = 0

    async def ask(session: aiohttp.ClientSession, prompt: str, length: int) -> None:
        nonlocal tokens, errors
        began = time.perf_counter()
        request = {"prompt": prompt, "max_tokens": length, "ignore_eos": True}
        async with session.post(f"{url}/v1/completions", json=request) as answer:
            body = await answer.json()
            errors += answer.status != 200
            tokens += body["usage"]["completion_tokens"] if answer.status == 200 else 0
        seconds.append(time.perf_counter() - began)

    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(connector=connector) as session:
        took = await at_once([partial(ask, session, *a) for a in asked(given)])
    cuts = statistics.quantiles(seconds, n=100)
    return {"tokens_per_s": tokens / took, "errors": errors, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}


class Engine:
    """A bare vLLM engine in a process of its own, which runs a round for each line that it reads."""

    def __init__(self, model: Path):
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "tests.bench.bench_serving_engine", str(model)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def round(self, given: argparse.Namespace) -> float:
        """Run all requests once, and return tokens/s."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked(given)) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("tokens/s "):
            assert line, "the engine's process ended"
        return float(line.split()[1])

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: Any) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


if __name__ == "__main__":
    main()
