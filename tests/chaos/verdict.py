"""The calm run, and the checks that compare a run with faults to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from dvpo_service.data.ledger import check_ledger
from tests.chaos.harness import ROOT, Harness, survivors
from tests.chaos.report import Check, accuracy_check
from tests.chaos.settings import write_config

CALM_S = 3600.0
ACCURACY = "eval/val/accuracy"
HELD_OUT = 300  # prompts


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def calm_rows(folder: Path, steps: int, make: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metrics of a run of the same config without faults. Train it in ``folder`` unless it is there.

    The run has a cluster of its own, and makes the base model in ``base-models/``.
    """
    run_dir = folder / f"calm-{steps}"
    if not (run_dir / "summary.json").exists():
        file = write_config(folder / f"calm-{steps}.yaml", make())
        print(f"calm run: {run_dir}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "dvpo_service", "train", "--config", str(file), "--run-dir", str(run_dir)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=CALM_S)
    return rows(run_dir / "metrics.jsonl")


def run_checks(harness: Harness, calm: list[dict[str, Any]], prompts: int, steps: int) -> list[Check]:
    """Check the finished run, while the cluster and the disk are still there."""
    run_dir = harness.run_dir
    metrics = rows(run_dir / "metrics.jsonl")
    wrong = check_ledger(run_dir / "ledger.jsonl", prompts)
    numbers = [r["step"] for r in metrics]
    ledger = [r["step"] for r in rows(run_dir / "ledger.jsonl")]
    complete = harness.finished and numbers == list(range(steps + 1))
    used = sum(len(r["prompts"]) for r in rows(run_dir / "ledger.jsonl"))
    left = survivors(harness.family.actors_left)
    accuracy = metrics[-1].get(ACCURACY) if metrics else None
    return [
        Check("the run finished, each step once", complete, f"{len(numbers)} rows"),
        Check("no unexpected end", not harness.unexpected, "; ".join(harness.unexpected) or "none"),
        Check(
            "no prompt lost or repeated",
            not wrong and ledger == list(range(steps)),
            "; ".join(wrong) or f"{used} prompts of {len(ledger)} steps, epochs of {prompts}",
        ),
        Check("no process of the run on its cluster", not left, ", ".join(left) or "none"),
        _mlflow_check(harness, steps),
        accuracy_check(calm[-1][ACCURACY], accuracy, HELD_OUT)
        if accuracy is not None
        else Check("held-out accuracy", False, "there is none"),
    ]


def _mlflow_check(harness: Harness, steps: int) -> Check:
    name = "MLflow has each metric of each step once"
    client = MlflowClient(harness.mlflow.uri)
    run_id = harness.mlflow_run()
    if run_id is None:
        return Check(name, False, "no run")
    wrong = []
    metrics = client.get_run(run_id).data.metrics
    for metric in metrics:
        repeated = [s for s, n in Counter(m.step for m in client.get_metric_history(run_id, metric)).items() if n > 1]
        wrong += [f"{metric} at {repeated[:3]}"] if repeated else []
    seen = sorted(m.step for m in client.get_metric_history(run_id, "reward/mean"))
    if seen != list(range(1, steps + 1)):
        wrong.append(f"reward/mean has steps {sorted(set(range(1, steps + 1)) - set(seen))[:5]} missing")
    return Check(name, not wrong, "; ".join(wrong[:5]) or f"{len(metrics)} metrics, {steps} steps")
