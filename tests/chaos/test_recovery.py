"""Processes are killed at chosen moments of a real run; it finishes, and nothing of its results is changed."""

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
import yaml
from mlflow import MlflowClient

from dvpo_service.data.ledger import check_ledger

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, SEED = 12, 4, 0
SILENCE_S = 20
PROMPTS = 100  # of 32 a step: several epochs, whose ends are inside of batches
# Not results: how long it took, what was repaired, and what depends on which engine sampled beside what.
NOT_RESULTS = ("time/", "pool/", "rollout/reused", "rollout/tokens_per_s", "policy/rollout_")


def write_config(folder: Path, model: Path) -> Path:
    shipped = ROOT / "dvpo_service" / "data" / "shipped" / "demo-train.jsonl"
    train = folder / "train.jsonl"
    train.write_text("".join(f"{line}\n" for line in shipped.read_text().splitlines()[:PROMPTS]))
    config = {
        "model": {"path": str(model)},
        "data": {
            "train_files": str(train),
            "val_files": {"val": "shipped:demo-val.jsonl"},
            "max_prompt_tokens": 16,
            "val_limit": 16,
        },
        "rollout": {
            "num_engines": 2,
            "prompts_per_step": 32,
            "n": 4,
            "max_new_tokens": 32,
            "enforce_eager": True,
            "kv_cache_gib": 0.2,
            "heartbeat_timeout_s": SILENCE_S,
        },
        "reward": {"function": "tests.e2e.rewards:short_answer"},
        "algorithm": {"n_quantiles": 20, "critic_hidden_dim": 32},
        "critic": {"world_size": 2, "micro_batch_size": 32, "mini_batch_size": 64, "optim": {"lr": 1e-3}},
        "policy": {"world_size": 2, "micro_batch_size": 32, "mini_batch_size": 64, "optim": {"lr": 1e-3}},
        "trainer": {"num_steps": STEPS, "eval_every": 6, "save_every": SAVE_EVERY},
        "cluster": {"restart_backoff_s": 0.5},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def plan() -> list[dict[str, Any]]:
    """One fault of each kind; the seed chooses the moments and the victims."""
    rng = random.Random(SEED)
    first, second, third = sorted(rng.sample(range(2, STEPS), 3))
    engine = rng.randrange(2)
    before, after = rng.randrange(1, SAVE_EVERY), rng.randrange(SAVE_EVERY + 1, STEPS - 1)  # the first checkpoint
    return [
        {"step": first, "at": "generate", "victim": f"engine:{engine}", "after_s": 0.15},
        # While the other one is starting again: generation waits for it, and weights are pushed to it at once.
        {"step": second, "at": "generate", "victim": f"core:{1 - engine}", "after_s": 0.15},
        {"step": third, "at": "generate", "victim": f"hang:{engine}", "after_s": 0.15},
        {"step": before, "at": "update", "victim": f"policy:{rng.randrange(2)}", "after_s": 0.05},
        {"step": after, "at": "update", "victim": f"critic:{rng.randrange(2)}", "after_s": 0.05},
    ]


def start(config: Path, run_dir: Path, faults: list[dict[str, Any]]) -> subprocess.Popen[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "terminal.txt").open("a") as terminal:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.faulty_run", str(config), str(run_dir), json.dumps(faults)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=terminal,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Family:
    """Every process that a run had, its children's children included."""

    def __init__(self, run: subprocess.Popen[str]):
        self.run, self.seen = run, set[psutil.Process]()

    def look(self) -> None:
        if self.run.poll() is None:
            self.seen |= {psutil.Process(self.run.pid), *psutil.Process(self.run.pid).children(recursive=True)}

    def left(self) -> list[str]:
        alive = [p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return [f"{p.pid} {p.name()}" for p in alive]

    def all_gone(self, within_s: float) -> float:
        """Seconds until no process is left."""
        began = time.monotonic()
        while self.left() and time.monotonic() - began < within_s:
            time.sleep(0.2)
        assert self.left() == [], f"still there after {within_s} s"
        return time.monotonic() - began


def finish(run: subprocess.Popen[str], run_dir: Path) -> Family:
    family, deadline = Family(run), time.monotonic() + 900
    while run.poll() is None:
        assert time.monotonic() < deadline, (run_dir / "terminal.txt").read_text()[-3000:]
        family.look()
        time.sleep(0.3)
    assert run.returncode == 0, (run_dir / "terminal.txt").read_text()[-4000:]
    return family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    write_config(folder, tiny_model)
    return folder


@pytest.fixture(scope="module")
def calm(folder: Path) -> Path:
    run_dir = folder / "calm"
    finish(start(folder / "chaos.yaml", run_dir, []), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def faulty(folder: Path) -> tuple[Path, Family]:
    run_dir = folder / "faulty"
    return run_dir, finish(start(folder / "chaos.yaml", run_dir, plan()), run_dir)


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def results(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith(NOT_RESULTS)} for row in rows(run_dir)]


def test_every_fault_struck_where_it_was_meant_to(faulty: tuple[Path, Family]) -> None:
    struck = rows(faulty[0], "faults.jsonl")
    assert sorted(f["victim"] for f in struck) == sorted(f["victim"] for f in plan())
    assert all(f["during"] for f in struck if f["at"] == "generate")


def test_a_dead_process_is_noticed_soon(faulty: tuple[Path, Family]) -> None:
    seen = [s["time"] for s in rows(faulty[0], "seen.jsonl")]
    for fault in rows(faulty[0], "faults.jsonl"):
        delay = min(t - fault["time"] for t in seen if t >= fault["time"])
        print(f"{fault['victim']}: noticed after {delay:.2f} s")
        assert delay < (SILENCE_S + 15 if fault["victim"].startswith("hang") else 15)


def test_a_run_through_faults_gives_the_results_of_a_calm_one(calm: Path, faulty: tuple[Path, Family]) -> None:
    calm_rows, faulty_rows = results(calm), results(faulty[0])
    assert [r["step"] for r in faulty_rows] == list(range(STEPS + 1)), "each step stands once"
    for a, b in zip(calm_rows, faulty_rows, strict=True):
        assert {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {}, a["step"]


def test_every_prompt_is_used_once_an_epoch(calm: Path, faulty: tuple[Path, Family]) -> None:
    assert check_ledger(faulty[0] / "ledger.jsonl", PROMPTS) == []
    assert rows(faulty[0], "ledger.jsonl") == rows(calm, "ledger.jsonl")
    assert len(rows(calm, "ledger.jsonl")) == STEPS


def test_restarts_are_seen_and_scored_rollouts_used_again(faulty: tuple[Path, Family]) -> None:
    last, terminal = rows(faulty[0])[-1], (faulty[0] / "terminal.txt").read_text()
    assert {k: v for k, v in last.items() if k.startswith("pool/restarts/")} == {
        "pool/restarts/rollout": 3,
        "pool/restarts/policy": 1,
        "pool/restarts/critic": 1,
        "pool/restarts/reward": 0,
    }
    assert sum(r.get("rollout/reused", 0) > 0 for r in rows(faulty[0])) >= 2
    for words in ("EngineDeadError", "no heartbeat", "policy lost a rank", "critic lost a rank", "serves again after"):
        assert words in terminal


def test_mlflow_has_each_step_once(faulty: tuple[Path, Family]) -> None:
    where = json.loads((faulty[0] / "summary.json").read_text())["where"]
    history = MlflowClient(where["mlflow_tracking_uri"]).get_metric_history(where["mlflow_run_id"], "reward/mean")
    assert sorted(m.step for m in history) == list(range(1, STEPS + 1))


def test_no_process_is_left_of_a_run_with_faults(faulty: tuple[Path, Family]) -> None:
    faulty[1].all_gone(within_s=10)


def test_nothing_outlives_a_killed_driver(folder: Path) -> None:
    run_dir = folder / "killed"
    run = start(folder / "chaos.yaml", run_dir, [])
    family = Family(run)
    while not (run_dir / "ledger.jsonl").exists() or len(rows(run_dir, "ledger.jsonl")) < 2:
        assert run.poll() is None, (run_dir / "terminal.txt").read_text()[-3000:]
        family.look()
        time.sleep(0.3)
    family.look()
    run.send_signal(signal.SIGKILL)
    run.wait(10)
    seconds = family.all_gone(within_s=90)
    print(f"all {len(family.seen)} processes were gone {seconds:.1f} s after the driver")
