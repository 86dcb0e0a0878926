"""Measure what generating ahead saves: the same run with ``rollout.max_staleness`` 0, 1 and 2, one after the other.

``python -m tests.bench.bench_ahead [key=value ...]`` prints one JSON object. By default it runs GRPO on a small model,
with responses of 64 tokens that take the engine about as long as the policy's update takes: two processes, two cores.
``speedup`` is the median step at staleness 0 divided by the median step at k. ``waited_share`` is the share of a step
that is spent waiting for rollouts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, WARM = 30, 6
OVERRIDES = (
    f"trainer.num_steps={STEPS}",
    "trainer.eval_every=0",
    "trainer.save_every=0",
    "data.val_limit=4",
    "model.warmstart.steps=1",  # its responses do not end by themselves, so all have the maximal length
    "algorithm.adv_estimator=grpo",
    "rollout.max_new_tokens=64",
)


def main(overrides: list[str]) -> None:
    by_staleness = {}
    with tempfile.TemporaryDirectory() as folder:
        for staleness in (0, 1, 2):
            run = Path(folder) / f"ahead-{staleness}"
            command = [sys.executable, "-m", "dvpo_service", "train", "--config", "demo", "--run-dir", str(run)]
            more = [f"rollout.max_staleness={staleness}", *OVERRIDES, *overrides]
            subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL, timeout=1200)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            by_staleness[staleness] = figures(rows[1 + WARM : -1])
    step_s = by_staleness[0]["step_s"]
    results = {k: row | {"speedup": round(step_s / row["step_s"], 2)} for k, row in by_staleness.items()}
    print(json.dumps(results, indent=2))


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians over the rows of metrics."""

    def median(name: str) -> float:
        return statistics.median(r.get(name, 0.0) for r in rows)

    waited = "time/wait" if "time/wait" in rows[0] else "time/generate"
    return {
        "step_s": round(median("time/step"), 3),
        "generate_s": round(median("time/generate"), 3),
        "waited_share": round(median(waited) / median("time/step"), 3),
        "staleness": median("rollout/staleness"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
