"""A real run is asked to stop, as by a terminal or a scheduler: checkpoint, clean end, and the same numbers after."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from dvpo_service.tracking.store import default_tracking_uri
from tests.e2e.test_train import ROOT, write_config

pytestmark = pytest.mark.e2e

STEPS = 8
WAIT_S = 400
OUTLIVED_S = 90.0


def start(config: Path, run: Path) -> subprocess.Popen[str]:
    """Start `dvpo train` in a process group of its own, as a shell does, with its output in a file in the run."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "terminal.txt").open("a") as terminal:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "dvpo_service", "train", "--config", str(config), "--run-dir", str(run)),
                *(f"trainer.num_steps={STEPS}", "trainer.eval_every=4", "trainer.save_every=0"),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=terminal,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while not any(row["step"] >= step for row in rows(run)):
        assert process.poll() is None, (run / "terminal.txt").read_text()[-3000:]
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.05)


ENGINE = "policy/rollout_"  # compares engine and trainer log-probs; unused by updates at the default correction


def learned(run: Path) -> list[dict[str, Any]]:
    """Return all metrics of all steps, except for times and speeds and for the metrics of ``ENGINE``."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time", ENGINE)) and not k.endswith("_per_s")}
        for row in rows(run)
    ]


def mismatch(run: Path, name: str) -> list[float]:
    """Return a metric of ``ENGINE`` by step. Its last digit depends on which requests vLLM batched together."""
    return [row[f"{ENGINE}{name}"] for row in rows(run) if f"{ENGINE}{name}" in row]


def test_stopped_and_killed_and_continued_equals_a_run_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    alone = start(config, whole)  # runs beside the first part of the other run: there is a core for each

    process = start(config, cut)
    wait_for_step(process, cut, 2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 5, "Ray's, the engine's, the ranks'"
    # Ctrl-C in a terminal reaches every process of the group: Ray's and vLLM's too. SIGTERM: test_job_submit.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT, (cut / "terminal.txt").read_text()[-3000:]
    assert psutil.wait_procs(family, timeout=20)[1] == [], "every process of the run has ended"
    printed = (cut / "terminal.txt").read_text()
    state = json.loads(next(cut.glob("checkpoints/*/state.json")).read_text())
    reached = state["state"]["step"]
    assert 2 <= reached < STEPS
    assert f"stopping: checkpoint at step {reached} written; the same command continues" in printed
    assert "Traceback" not in printed
    client = MlflowClient(default_tracking_uri(cut))
    assert client.get_run(state["mlflow_run_id"]).info.status == "KILLED"
    assert alone.wait(WAIT_S) == 0, (whole / "terminal.txt").read_text()[-3000:]

    # SIGKILL at about the time of the last checkpoint. Either the checkpoint is torn and the steps are repeated, or it
    # is complete and only the export and the summary are left to do.
    process = start(config, cut)
    wait_for_step(process, cut, STEPS)
    family = psutil.Process(process.pid).children(recursive=True)
    time.sleep(random.Random(7).uniform(0, 0.5))
    process.kill()
    process.wait(10)
    killed = time.monotonic()

    process = start(config, cut)
    assert process.wait(WAIT_S) == 0, (cut / "terminal.txt").read_text()[-3000:]
    # Two of Ray's agents keep reporting to the killed server for a minute.
    left = psutil.wait_procs(family, timeout=max(0.0, killed + OUTLIVED_S - time.monotonic()))[1]
    assert left == [], "nothing outlives a killed driver"
    assert [p.name for p in (cut / "checkpoints").iterdir() if p.name.startswith(".")] == [], "nothing torn is left"
    assert json.loads((cut / "summary.json").read_text())["steps"] == STEPS
    assert (cut / "policy" / "export.json").is_file()
    assert learned(cut) == learned(whole)
    for name in ("kl", "ess"):
        assert mismatch(cut, name) == pytest.approx(mismatch(whole, name), rel=1e-4, abs=1e-9)
    # The mean of float32 rounding errors of log-probs, which have either sign, is nothing but noise. It is therefore
    # compared with zero, to a unit in the last place, and not with the other run's noise.
    for run in (cut, whole):
        assert len(mismatch(run, "kl_k1")) == STEPS
        assert mismatch(run, "kl_k1") == pytest.approx([0.0] * STEPS, abs=6e-8)
    assert client.get_run(state["mlflow_run_id"]).info.status == "FINISHED"
