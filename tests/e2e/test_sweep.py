"""A sweep as a user runs it: a trial is killed, then the whole sweep is killed and continued.

One arm has actors and vLLM, the other is one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from tests.e2e.test_train import ROOT, write_config
from tune_sweeps.records import TrialState, read_sweep

pytestmark = pytest.mark.e2e

STEPS = 6
VAL_LIMIT = 16
GRID = {
    "title": "with and without the gain",
    "reference": "full",
    "arms": {
        "full": {},
        "no-gain": {"algorithm.dvpo_loss_weights.ablate_gain": True, "cluster.in_process": True},
    },
}


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start ``dvpo sweep`` in the background, with its output in a file."""
    config = write_config(folder)
    grid = folder / "gain.yaml"
    grid.write_text(yaml.safe_dump(GRID))
    (folder / "my_parts.py").write_text((Path(__file__).parent / "parts.py").read_text())
    keys = [f"trainer.num_steps={STEPS}", "trainer.eval_every=3", "trainer.save_every=1", f"data.val_limit={VAL_LIMIT}"]
    keys += ["policy.loss=my_parts:surrogate", "algorithm.critic_terms={'my_parts:spread': 0.01}"]
    command = [
        "sweep",
        "--config",
        str(config),
        "--grid",
        str(grid),
        "--seeds",
        "1",
        "--run-dir",
        str(folder / "sweep"),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "dvpo_service", *command, *options, *keys],
        cwd=folder,  # where my_parts is
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=(folder / "log").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what: Callable[[], Any], sweep: subprocess.Popen[str], folder: Path, timeout_s: float = 300) -> Any:
    """Wait until ``what()`` is true, and return it. Fails if the sweep ends before."""
    deadline = time.time() + timeout_s
    while time.time() < deadline:
        result = what()
        if result:
            return result
        assert sweep.poll() is None, (folder / "log").read_text()[-4000:]
        time.sleep(0.3)
    raise AssertionError((folder / "log").read_text()[-4000:])


def steps_of(folder: Path, arm: str) -> list[int]:
    path = folder / "sweep" / "trials" / f"{arm}-seed0" / "metrics.jsonl"
    return (
        [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def trial_process(sweep: subprocess.Popen[str]) -> psutil.Process | None:
    family = psutil.Process(sweep.pid).children(recursive=True)
    return next((p for p in family if any("ImplicitFunc" in part for part in p.cmdline())), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that lost its first trial's process, then itself, and was continued to the end."""
    folder = tmp_path_factory.mktemp("sweeps")
    sweep = start(folder)
    try:
        wait_for(lambda: len(steps_of(folder, "full")) >= 4, sweep, folder)
        victim = trial_process(sweep)
        assert victim is not None
        victim.kill()
        wait_for(lambda: len(steps_of(folder, "no-gain")) >= 3, sweep, folder)
        sweep.send_signal(signal.SIGKILL)
        sweep.wait(30)
        sweep = start(folder, "--resume")
        assert sweep.wait(400) == 0, (folder / "log").read_text()[-4000:]
    finally:
        if sweep.poll() is None:
            sweep.kill()
    return folder


def test_every_trial_ends_with_every_step_once(folder: Path) -> None:
    for arm in ("full", "no-gain"):
        assert steps_of(folder, arm) == list(range(STEPS + 1))
    states = {t.state.arm: t.state for t in read_sweep(folder / "sweep").trials}
    assert {s.status for s in states.values()} == {"done"}
    assert states["full"].attempts == 2, "killed once, tried again from its checkpoint"
    assert states["no-gain"].attempts == 2, "the sweep was killed, and continued it"


def test_the_arms_of_a_seed_share_their_start(folder: Path) -> None:
    origins = {
        (folder / "sweep" / "trials" / f"{arm}-seed0/base/origin.json").read_text() for arm in ("full", "no-gain")
    }
    assert len(origins) == 1, "one base model"
    first = [
        json.loads((folder / "sweep" / "trials" / f"{arm}-seed0" / "metrics.jsonl").read_text().splitlines()[0])
        for arm in ("full", "no-gain")
    ]
    scores = [{k: v for k, v in row.items() if k.startswith("eval/") and k.endswith("/greedy")} for row in first]
    # Greedy, because vLLM and transformers draw other random numbers; one prompt may be a tie that rounding decides.
    assert scores[0] == pytest.approx(scores[1], abs=1.5 / VAL_LIMIT)


def test_trials_are_nested_mlflow_runs(folder: Path) -> None:
    sweep = read_sweep(folder / "sweep")
    client = MlflowClient(sweep.mlflow_uri)
    assert sweep.mlflow_run_id
    parent = client.get_run(sweep.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    assert "with and without the gain" in parent.data.tags["mlflow.note.content"]
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{sweep.mlflow_run_id}'")
    assert {(c.data.tags["arm"], c.info.status) for c in children} == {("full", "FINISHED"), ("no-gain", "FINISHED")}
    assert all(c.data.params["trainer.num_steps"] == str(STEPS) for c in children)


def test_the_report_is_there(folder: Path) -> None:
    page = (folder / "sweep" / "report.html").read_text()
    assert "no-gain" in page
    assert "the seeds cannot tell" in page, "one seed tells nothing"
    assert (folder / "sweep" / "report.md").exists()


def test_the_same_folder_needs_resume(folder: Path) -> None:
    again = start(folder)
    assert again.wait(120) == 2
    assert "give --resume to continue it" in (folder / "log").read_text()


def test_a_trial_state_is_whole_or_absent(tmp_path: Path) -> None:
    assert TrialState.load(tmp_path) is None
    TrialState("a", 1, "running", attempts=2).save(tmp_path)
    assert TrialState.load(tmp_path) == TrialState("a", 1, "running", attempts=2)
