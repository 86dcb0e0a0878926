"""Every benchmark, one after the other: ``python -m tests.bench``. Each prints one JSON object."""

from __future__ import annotations

from tests.bench import bench_generation, bench_quantile_huber, bench_step

if __name__ == "__main__":
    for bench in (bench_quantile_huber, bench_generation, bench_step):
        bench.main()
