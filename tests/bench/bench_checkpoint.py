"""Measure what a checkpoint costs the loop: steps of the demo with a save and without one, in one run.

``python -m tests.bench.bench_checkpoint`` prints one JSON object, with medians. ``blocked_share`` is the share of a
step that the loop waits for a save to begin. ``slowdown`` is how much longer a step is while a save is written.
``write_s`` is the time from the beginning of a save until the checkpoint is complete.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, WARM, EVERY = 40, 6, 2


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        overrides = [f"trainer.num_steps={STEPS}", f"trainer.save_every={EVERY}", "trainer.eval_every=0"]
        command = [sys.executable, "-m", "dvpo_service", "train", "--config", "demo", "--run-dir", str(run)]
        subprocess.run(
            [*command, *overrides, "model.warmstart.steps=20"], check=True, stdout=subprocess.DEVNULL, timeout=1200
        )
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        newest = max((run / "checkpoints").glob("step-*"))
        mib = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file()) / 2**20
    print(json.dumps(figures(rows[1 + WARM :]) | {"checkpoint_mib": round(mib, 1)}, indent=2))


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the costs of a save. It begins at the end of a step, and is in the next step's row."""
    during = [r for r in rows if "time/checkpoint" in r]
    calm = [r for r in rows if "time/checkpoint" not in r]
    calm_s, during_s = (statistics.median(r["time/step"] for r in part) for part in (calm, during))
    blocked = statistics.median(r["time/checkpoint"] for r in during)
    return {
        "saves": len(during),
        "step_s": round(calm_s, 3),
        "blocked_s": round(blocked, 4),
        "blocked_share": round(blocked / calm_s, 4),
        "slowdown": round(during_s / calm_s - 1, 4),
        "write_s": round(statistics.median(r["time/checkpoint_write"] for r in during), 3),
    }


if __name__ == "__main__":
    main()
