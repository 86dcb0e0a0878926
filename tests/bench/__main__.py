"""Every benchmark, one after the other: ``python -m tests.bench``. Each prints one JSON object."""

from __future__ import annotations

import json

from dvpo_service.bench import quantile_huber
from tests.bench import bench_generation, bench_step

if __name__ == "__main__":
    print(json.dumps(quantile_huber.run(), indent=2))
    for bench in (bench_generation, bench_step):
        bench.main()
