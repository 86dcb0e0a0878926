"""`ray job submit` on a cluster of three nodes: logs, a stop with a checkpoint, and a second job to the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from dvpo_service.tracking.store import default_tracking_uri
from tests.e2e.raycluster import RayCluster, wait_until
from tests.e2e.test_train import write_config

pytestmark = pytest.mark.e2e

STEPS = 10
JOB_S = 400.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster() as cluster:
        cluster.start_head(cpus=1)
        cluster.start_worker(cpus=2)
        cluster.start_worker(cpus=2)
        yield cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder to submit from, with a config, and a reward, a loss and a critic term that no node has installed."""
    folder = tmp_path_factory.mktemp("project")
    tree = yaml.safe_load(write_config(folder, tiny_model).read_text())
    tree["reward"]["function"] = "my_reward:short_answer"
    tree["policy"] |= {"world_size": 2, "loss": "my_parts:surrogate"}
    tree["algorithm"] |= {"critic_terms": {"my_parts:spread": 0.01}}
    tree["rollout"] |= {"num_engines": 1}
    tree["trainer"] = {"num_steps": STEPS, "eval_every": 5, "save_every": 0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    for name, source in (("my_reward", "rewards"), ("my_parts", "parts")):
        (folder / f"{name}.py").write_text((Path(__file__).parent / f"{source}.py").read_text())
    return folder


def submit(cluster: RayCluster, project: Path, name: str, runs: Path) -> None:
    # The service sets TOKENIZERS_PARALLELISM too: the value of the job wins, without a conflict.
    variables = {"DVPO_RUNS": str(runs), "RAY_JOB_STOP_WAIT_TIME_S": "90", "TOKENIZERS_PARALLELISM": "false"}
    cluster.ray(
        *("job", "submit", "--no-wait", "--submission-id", name, "--working-dir", "."),
        *("--runtime-env-json", json.dumps({"env_vars": variables})),
        *("--", "dvpo", "train", "--config", "tiny.yaml"),
        cwd=project,
    )


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_stop_checkpoints_and_resubmit_continues(cluster: RayCluster, project: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    submit(cluster, project, "first", tmp_path)

    def started() -> bool:
        assert cluster.status("first") not in ("FAILED", "STOPPED"), cluster.ray("job", "logs", "first")[-4000:]
        return any(row["step"] >= 2 for row in rows(run))

    wait_until(started, JOB_S, "step 2 of the first job")
    homes = cluster.homes("Rank", "VllmEngine", "RewardWorker")
    assert all(homes.values()), homes
    assert len(set().union(*homes.values())) == 3, f"pools on every node: {homes}"
    cluster.ray("job", "stop", "first")
    assert cluster.status("first") == "STOPPED"
    log = cluster.ray("job", "logs", "first")
    record = json.loads(max(run.glob("checkpoints/*/state.json")).read_text())
    step = record["state"]["step"]
    assert 2 <= step < STEPS
    assert f"stopping: checkpoint at step {step} written; the same command continues" in log
    assert "16 prompts x 8" in log
    assert f"step 2/{STEPS} reward=" in log, "plain lines, no bars"
    assert "\x1b[" not in log.split("16 prompts x 8")[1]
    client = MlflowClient(default_tracking_uri(run))
    assert client.get_run(record["mlflow_run_id"]).info.status == "KILLED"
    wait_until(lambda: not any(cluster.homes("Rank", "VllmEngine").values()), 60, "the first job's actors end")

    submit(cluster, project, "second", tmp_path)
    wait_until(lambda: cluster.status("second") not in ("PENDING", "RUNNING"), JOB_S, "the second job's end")
    log = cluster.ray("job", "logs", "second")
    assert cluster.status("second") == "SUCCEEDED", log[-4000:]
    assert f"at step {step}" in log
    assert [row["step"] for row in rows(run)] == list(range(STEPS + 1))
    assert all(row["critic/loss/spread"] > 0 for row in rows(run)[1:]), "the term travelled with the job"
    assert "my_parts:surrogate" in (run / "config.yaml").read_text()
    assert client.get_run(record["mlflow_run_id"]).data.params["policy.loss"] == "my_parts:surrogate"
    assert client.get_run(record["mlflow_run_id"]).info.status == "FINISHED"
    assert json.loads((run / "summary.json").read_text())["where"]["mlflow_run_id"] == record["mlflow_run_id"]


def test_nothing_of_a_job_is_left_in_memory_files() -> None:
    mine = [f for f in os.listdir("/dev/shm") if f.startswith(("dvpo-weights", "dvpo-received"))]
    assert mine == []
