"""Measure a step of the demo: the time outside of all stages, the time of sync, and the memory of all processes.

``python -m tests.bench.bench_step`` prints one JSON object. It is a real run of the demo's config.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

STEPS, WARM = 30, 5
STAGES = ("generate", "score", "logprobs", "advantages", "update", "sync")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        overrides = [f"trainer.num_steps={STEPS}", "trainer.eval_every=0", "model.warmstart.steps=20"]
        command = [sys.executable, "-m", "dvpo_service", "train", "--config", "demo", "--run-dir", str(run), *overrides]
        peak = watch(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps(figures(rows[1 + WARM :]) | {"peak_memory_gib": round(peak / 2**30, 2)}, indent=2))


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians over the rows of metrics."""

    def share(names: tuple[str, ...]) -> float:
        return statistics.median(sum(r[f"time/{n}"] for n in names) / r["time/step"] for r in rows)

    return {
        "steps": len(rows),
        "step_s": round(statistics.median(r["time/step"] for r in rows), 3),
        "overhead_share": round(1 - share(STAGES), 4),
        "sync_share": round(share(("sync",)), 4),
        "sync_s": round(statistics.median(r["time/sync"] for r in rows), 4),
        "tokens_per_s": round(statistics.median(r["rollout/tokens_per_s"] for r in rows)),
    }


def watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process to end, and return the peak memory of it and its descendants, in bytes.

    The memory is proportional: shared pages are counted once.
    """
    peak = 0
    root = psutil.Process(process.pid)
    known: dict[int, psutil.Process] = {}
    while process.poll() is None:
        # Ray's processes leave the process tree, so take all processes that are younger than the run.
        for p in psutil.process_iter(["create_time"]):
            if p.info["create_time"] >= root.create_time():
                known[p.pid] = p
        peak = max(peak, sum(_memory(p) for p in known.values()))
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    return peak


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


if __name__ == "__main__":
    main()
