"""Run the benchmarks one after the other: ``python -m tests.bench``. Each prints one JSON object."""

from __future__ import annotations

import json

from dvpo_service.bench import advantages, critic_step, quantile_huber
from tests.bench import bench_generation, bench_memory, bench_step

if __name__ == "__main__":
    for algorithm in (quantile_huber, advantages, critic_step):
        print(json.dumps(algorithm.run(), indent=2))
    for bench in (bench_memory, bench_generation, bench_step):
        bench.main()
