"""Faults at chosen moments of a real run: the run finishes, and its results do not change."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dvpo_service.data.ledger import check_ledger
from tests.chaos.events import Events
from tests.chaos.family import Family, shared_memory
from tests.chaos.faults import DEAD_S, KINDS, NAN, Fault, write_plan
from tests.chaos.report import Outcome, outcomes
from tests.chaos.settings import shipped_prompts, small_config, write_config
from tests.tracking.server import MlflowServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, SEED = 12, 4, 0
SILENCE_S = 30
PROMPTS = 100  # with 32 prompts a step: several epochs that end inside of batches
AWAY = range(3, 7)  # steps that the MLflow server misses
# Not results: durations, repairs, and metrics that depend on which requests an engine sampled together.
NOT_RESULTS = ("time/", "pool/", "rollout/reused", "rollout/tokens_per_s", "policy/rollout_")
REWARDS = ("reward-raise", "reward-nan", "reward-none", "reward-text", "reward-memory")


def chaos_config(model: Path, folder: Path, uri: str | None = None) -> dict[str, Any]:
    trainer = {"world_size": 2, "micro_batch_size": 32, "mini_batch_size": 64, "optim": {"lr": 1e-3}}
    return small_config(
        {"path": str(model)},
        shipped_prompts(folder, PROMPTS),
        rollout={"prompts_per_step": 32, "n": 4, "max_new_tokens": 32, "heartbeat_timeout_s": SILENCE_S},
        data={"val_limit": 16},
        reward={"function": "tests.chaos.rewards:short", "max_memory_gib": 0.5},
        algorithm={"n_quantiles": 20, "critic_hidden_dim": 32},
        critic=trainer,
        policy=trainer,
        trainer={"num_steps": STEPS, "eval_every": 6, "save_every": SAVE_EVERY},
        tracking={"mlflow_uri": uri} if uri else {},
    )


def of_the_steps() -> list[Fault]:
    """Return the faults that belong to their step and are in the calm run too: bad rewards, a NaN in each trainer."""
    rng = random.Random(SEED)
    steps = rng.sample(range(1, STEPS), len(REWARDS))
    bad = [Fault(100 + i, kind, steps[i], "score", rng.randrange(128)) for i, kind in enumerate(REWARDS)]
    one, other = sorted(rng.sample(range(1, STEPS, 2), 2))
    return [*bad, Fault(200, "nan-policy", one, "update", 0), Fault(201, "nan-critic", other, "update", 1)]


def kills() -> list[Fault]:
    """Return one fault of each kind that ends or stops a process. The seed chooses the moments and the victims."""
    rng = random.Random(SEED)
    first, second, third = sorted(rng.sample(range(2, STEPS), 3))
    before, after = rng.randrange(1, SAVE_EVERY), rng.randrange(SAVE_EVERY + 1, STEPS - 1)  # the first checkpoint
    return [
        Fault(0, "engine", first, "generate", rng.randrange(2), 0.15),
        # Usually the other engine is restarting then: generation waits for it, and it gets the weights at once.
        Fault(1, "core", second, "generate", rng.randrange(2), 0.15),
        Fault(2, "hang", third, "generate", rng.randrange(2), 0.15),
        Fault(3, "policy", before, "update", rng.randrange(2), 0.05),
        Fault(4, "critic", after, "update", rng.randrange(2), 0.05),
        Fault(5, "reward-worker", rng.randrange(2, STEPS), "score", 0, 0.0),
    ]


def start(config: Path, run_dir: Path, faults: list[Fault]) -> subprocess.Popen[str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_plan(faults, run_dir / "plan.jsonl")
    with (run_dir / "terminal.txt").open("a") as terminal:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.faulty_run", str(config), str(run_dir), str(run_dir / "plan.jsonl")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=terminal,
            stderr=subprocess.STDOUT,
            text=True,
        )


def family_of(run: subprocess.Popen[str]) -> Family:
    return Family(lambda: [run.pid] if run.poll() is None else [])


def finish(run: subprocess.Popen[str], run_dir: Path, meanwhile: Callable[[], None] = lambda: None) -> Family:
    family = family_of(run)
    deadline = time.monotonic() + 900
    while run.poll() is None:
        assert time.monotonic() < deadline, (run_dir / "terminal.txt").read_text()[-3000:]
        family.look()
        meanwhile()
        time.sleep(0.3)
    assert run.returncode == 0, (run_dir / "terminal.txt").read_text()[-4000:]
    return family


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    config = write_config(folder / "chaos.yaml", chaos_config(tiny_model, folder))
    finish(start(config, folder / "run", of_the_steps()), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Family, set[str]]:
    """Return the run directory, its processes, and the files it left in /dev/shm. MLflow was away for some steps."""
    folder = tmp_path_factory.mktemp("faulty")
    before = shared_memory()
    with MlflowServer(folder / "mlflow") as mlflow:
        config = write_config(folder / "chaos.yaml", chaos_config(tiny_model, folder, mlflow.uri))
        run_dir = folder / "run"

        def server() -> None:
            reached = max((e["step"] for e in Events(run_dir / "events.jsonl").read("step")), default=0)
            if mlflow.process and reached in AWAY:
                mlflow.kill()
            if not mlflow.process and reached >= AWAY.stop:
                mlflow.start()

        family = finish(start(config, run_dir, [*kills(), *of_the_steps()]), run_dir, server)
    return run_dir, family, shared_memory() - before


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def results(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith(NOT_RESULTS)} for row in rows(run_dir)]


def fault_outcomes(run_dir: Path) -> list[Outcome]:
    return outcomes(Events(run_dir / "events.jsonl").read(), {"hang": SILENCE_S + DEAD_S})


def test_every_fault_struck_where_it_was_meant_to(faulty: tuple[Path, Family, set[str]]) -> None:
    struck = Events(faulty[0] / "events.jsonl").read("struck")
    assert sorted(f["id"] for f in struck) == sorted(f.id for f in [*kills(), *of_the_steps()])
    assert all(f["during"] for f in struck if f["stage"] == "generate")


def test_each_is_noticed_soon(faulty: tuple[Path, Family, set[str]]) -> None:
    for fault in fault_outcomes(faulty[0]):
        print(f"{fault.kind} ({fault.victim}): noticed {fault.noticed_s}, recovered {fault.recovered_s} s after")
        assert fault.noticed_s is not None, fault
        assert fault.limit_s is None or fault.noticed_s < fault.limit_s, fault


def test_a_run_through_faults_gives_the_results_of_a_calm_one(
    calm: Path, faulty: tuple[Path, Family, set[str]]
) -> None:
    calm_rows, faulty_rows = results(calm), results(faulty[0])
    assert [r["step"] for r in faulty_rows] == list(range(STEPS + 1)), "each step stands once"
    for a, b in zip(calm_rows, faulty_rows, strict=True):
        assert {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {}, a["step"]


def test_a_bad_reward_is_one_failed_sample_and_a_nan_one_skipped_step(calm: Path) -> None:
    nan = {f.step + 1: KINDS[f.kind].pool for f in of_the_steps() if f.kind in NAN}
    for row in rows(calm)[1:]:
        expected = sum(f.step + 1 == row["step"] for f in of_the_steps() if f.kind in REWARDS)
        assert row["reward/failed"] == expected, row["step"]
        for pool in ("policy", "critic"):
            assert row[f"{pool}/skipped_steps"] == (nan.get(row["step"]) == pool), (row["step"], pool)


def test_every_prompt_is_used_once_an_epoch(calm: Path, faulty: tuple[Path, Family, set[str]]) -> None:
    assert check_ledger(faulty[0] / "ledger.jsonl", PROMPTS) == []
    assert rows(faulty[0], "ledger.jsonl") == rows(calm, "ledger.jsonl")
    assert len(rows(calm, "ledger.jsonl")) == STEPS


def test_restarts_are_seen_and_scored_rollouts_used_again(faulty: tuple[Path, Family, set[str]]) -> None:
    last, terminal = rows(faulty[0])[-1], (faulty[0] / "terminal.txt").read_text()
    assert {k: v for k, v in last.items() if k.startswith("pool/restarts/")} == {
        "pool/restarts/rollout": 3,
        "pool/restarts/policy": 1,
        "pool/restarts/critic": 1,
        "pool/restarts/reward": 1,
    }
    assert sum(r.get("rollout/reused", 0) > 0 for r in rows(faulty[0])) >= 2
    for words in ("EngineDeadError", "no heartbeat", "policy lost a rank", "critic lost a rank", "serves again after"):
        assert words in terminal


def test_mlflow_has_each_step_once_though_its_server_was_away(faulty: tuple[Path, Family, set[str]]) -> None:
    terminal = (faulty[0] / "terminal.txt").read_text()
    assert re.search(r"MLflow: .* not sent", terminal), "the outage was noticed"
    client = MlflowClient(f"sqlite:///{faulty[0].parent}/mlflow/mlflow.db")
    run_id = json.loads((faulty[0] / "summary.json").read_text())["where"]["mlflow_run_id"]
    for metric in ("reward/mean", "policy/loss"):
        assert sorted(m.step for m in client.get_metric_history(run_id, metric)) == list(range(1, STEPS + 1))


def test_nothing_is_left_of_a_run_with_faults(faulty: tuple[Path, Family, set[str]]) -> None:
    faulty[1].all_gone(within_s=10)
    assert [name for name in faulty[2] if name.startswith("psm_")] == []
