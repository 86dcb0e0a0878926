"""A real MLflow server is killed, or hangs, in the middle of a run: everything arrives once and in order."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from dvpo_service.tracking.figures import FanData
from dvpo_service.tracking.spool import UNSENT
from dvpo_service.tracking.tracker import Tracker
from tests.tracking.conftest import wait_until
from tests.tracking.server import MlflowServer

FAN = FanData("1+1=", ["2"], np.linspace(0, 1, 5), np.random.default_rng(0).random((1, 2, 5)), 1.0)
PICTURES = ("fan_over_training", "head_disagreement", "quantile_heatmap", "value_fan")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


def log(tracker: Tracker, step: int) -> float:
    """Log one step with everything that a run logs; return how long the loop was held up, in seconds."""
    began = time.monotonic()
    tracker.log(step, {"reward/mean": step / 10, "critic/loss/qr": math.inf})
    tracker.log_samples(step, [{"prompt": "1+1=", "response": str(step), "reward": math.nan}])
    tracker.log_critic_pictures(step, [FAN], [(step, [FAN])])
    return time.monotonic() - began


def check_all_there(server: MlflowServer, run_id: str | None, run_dir: Path, steps: int, tmp_path: Path) -> None:
    """Check that MLflow has every step's metrics, pictures and samples once and in order, and that no file waits."""
    assert run_id
    client = MlflowClient(tracking_uri=server.uri)

    def paths(folder: str | None = None) -> list[str]:
        items = client.list_artifacts(run_id, folder)
        return [p for item in items for p in (paths(item.path) if item.is_dir else [item.path])]

    for name, value in (("reward/mean", lambda s: s / 10), ("trainer/step", float)):
        points = client.get_metric_history(run_id, name)
        assert [(p.step, p.value) for p in points] == [(s, value(s)) for s in range(steps)]
        times = [p.timestamp for p in points]
        assert times == sorted(times), "sent late, but with the time at which they were measured"
    [held_out] = client.get_metric_history(run_id, "held_out/after/val")
    assert held_out.value == 0.7
    figures = [f"figures/{name}/step-{s:06d}.png" for name in PICTURES for s in range(steps)]
    assert sorted(paths()) == ["config.yaml", *figures, "samples.json", "summary.json"]
    table = json.loads(Path(client.download_artifacts(run_id, "samples.json", str(tmp_path))).read_text())
    assert table["columns"] == ["step", "prompt", "response", "reward"]
    assert table["data"] == [[s, "1+1=", str(s), None] for s in range(steps)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not (run_dir / UNSENT).exists()


def wait_for_pictures(run_dir: Path) -> None:
    """Wait until the pictures of steps 1 to 3 are drawn: they wait in files while the server is away."""
    figures = run_dir / UNSENT / "figures"
    drawn = [figures / name / f"step-{step:06d}.png" for name in PICTURES for step in range(1, 4)]
    wait_until(lambda: all(picture.is_file() for picture in drawn), 60)


def test_a_server_killed_and_started_again(server: MlflowServer, tmp_path: Path, make_config: Any, caplog: Any) -> None:
    tracker = Tracker(tmp_path / "a", make_config(mlflow_uri=server.uri))
    log(tracker, 0)
    server.kill()
    held_up = [log(tracker, step) for step in range(1, 4)]
    wait_for_pictures(tmp_path / "a")
    server.start()
    log(tracker, 4)
    tracker.finish("FINISHED", {"held_out_after": {"val": 0.7}}, deadline_s=60)
    assert max(held_up) < 0.5
    assert "did not get" not in caplog.text
    check_all_there(server, tracker.run_id, tmp_path / "a", 5, tmp_path)


def test_a_server_that_hangs_to_the_end_of_the_run(
    server: MlflowServer, tmp_path: Path, make_config: Any, caplog: Any
) -> None:
    config = make_config(mlflow_uri=server.uri)
    tracker = Tracker(tmp_path / "a", config)
    assert tracker._sink
    log(tracker, 0)
    server.freeze()
    try:
        held_up = [log(tracker, step) for step in range(1, 4)]
        wait_for_pictures(tmp_path / "a")
        began = time.monotonic()
        tracker.finish("FINISHED", {"held_out_after": {"val": 0.7}}, deadline_s=8)
        took = time.monotonic() - began
        waiting = list((tmp_path / "a" / UNSENT).rglob("*.png"))
    finally:
        tracker._sink._client = None  # type: ignore[assignment]  # the process ends here: no thread of it sends more
        server.thaw()
    assert max(held_up) < 0.5
    assert took < 12
    assert len(waiting) >= 3 * len(PICTURES)
    assert f"artifacts wait in {tmp_path / 'a' / UNSENT}, and the same command again sends both" in caplog.text

    again = Tracker(tmp_path / "a", config, run_id=tracker.run_id, resume_step=4)
    again.finish("FINISHED", {"held_out_after": {"val": 0.7}})
    check_all_there(server, again.run_id, tmp_path / "a", 4, tmp_path)
