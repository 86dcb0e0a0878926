"""The tracker on a real MLflow with SQLite: what MLflow holds after a run."""

from __future__ import annotations

import json
import math
import shutil
import socket
import time

import numpy as np
import pytest
from mlflow import MlflowClient

from dvpo_service.errors import TrackingError
from dvpo_service.runs.step_file import read_metrics
from dvpo_service.tracking import store
from dvpo_service.tracking.figures import FanData
from dvpo_service.tracking.names import safe_name
from dvpo_service.tracking.tracker import Tracker, _description
from tests.tracking.conftest import wait_until


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """Return a SQLite file with MLflow's tables. Creating them takes seconds, so every test gets a copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _store(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    shutil.copy(empty_store, tmp_path / "other.db")


def client_of(tracker) -> MlflowClient:
    return MlflowClient(tracking_uri=tracker.tracking_uri)


def history(tracker, name):
    return [(m.step, m.value) for m in client_of(tracker).get_metric_history(tracker.run_id, name)]


def samples_of(tracker, folder):
    folder.mkdir()
    path = client_of(tracker).download_artifacts(tracker.run_id, "samples.json", str(folder))
    return json.loads(open(path).read())


def paths_of(tracker, folder=None):
    paths = []
    for item in client_of(tracker).list_artifacts(tracker.run_id, folder):
        paths += paths_of(tracker, item.path) if item.is_dir else [item.path]
    return sorted(paths)


class Display:
    def __init__(self):
        self.steps = []
        self.notes = []

    def update(self, step, metrics):
        self.steps.append((step, dict(metrics)))

    def note(self, text):
        self.notes.append(text)


def test_a_whole_run(tmp_path, make_config):
    run_dir = tmp_path / "runs" / "a"
    tags = {"team": "rl", "hf_token": "hunter2"}
    tracker = Tracker(run_dir, make_config(tags=tags, run_name="first", experiment="exp"))
    fan = FanData("1+1=", ["2"], np.linspace(0, 1, 5), np.random.default_rng(0).random((1, 2, 5)), 1.0)
    for step in range(3):
        metrics = {"reward/mean": step / 10, "critic/loss/qr": math.inf, "eval/my (split)/accuracy": 0.5}
        tracker.log(step, metrics | {"critic/coverage/0.1": 0.2, "critic/coverage/0.9": 0.8})
        tracker.log_samples(step, [{"prompt": "1+1=", "response": "2", "reward": 1.0}] * 2)
    tracker.log_critic_pictures(2, [fan], [(1, [fan]), (2, [fan])])
    tracker.finish("FINISHED", {"held_out_after": {"val": 0.7}, "held_out_greedy_before": {"val": 0.4}})

    assert tracker.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    run = client_of(tracker).get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert client_of(tracker).get_experiment(run.info.experiment_id).name == "exp"
    assert history(tracker, "reward/mean") == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert history(tracker, safe_name("eval/my (split)/accuracy"))[0] == (0, 0.5)
    assert all(math.isnan(value) for _, value in history(tracker, "critic/loss/qr"))
    assert run.data.metrics["held_out/after/val"] == 0.7
    assert run.data.metrics["held_out/greedy_before/val"] == 0.4
    assert run.data.params["rollout.n"] == "8"
    assert run.data.params["algorithm.dvpo_loss_weights.ablate_gain"] == "False"
    assert run.data.tags["team"] == "rl"
    assert "32 prompts x 8 responses" in run.data.tags["mlflow.note.content"]
    assert paths_of(tracker) == [
        "config.yaml",
        *(f"figures/calibration/step-00000{step}.png" for step in range(3)),
        "figures/fan_over_training/step-000002.png",
        "figures/head_disagreement/step-000002.png",
        "figures/quantile_heatmap/step-000002.png",
        "figures/value_fan/step-000002.png",
        "samples.json",
        "summary.json",
    ]
    table = samples_of(tracker, tmp_path / "got")
    assert table["columns"] == ["step", "prompt", "response", "reward"]
    assert [row[0] for row in table["data"]] == [0, 0, 1, 1, 2, 2]
    # MLflow's UI shows a table only when the run has this tag.
    assert "samples.json" in run.data.tags["mlflow.loggedArtifacts"]
    everything = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert any("mlartifacts" in p.parts for p in everything)
    assert not [p for p in everything if b"hunter2" in p.read_bytes()]
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2]


def test_the_description_says_what_to_look_at(tmp_path, make_config):
    config = make_config()
    text = _description(config, tmp_path / "a")
    assert "32 prompts x 8 responses" in text
    for name in ("critic/loss", "critic/weighted", "figures/fan_over_training", "figures/head_disagreement"):
        assert f"`{name}`" in text
    assert "dvpo train --config config.yaml" in text
    algorithm = config.algorithm.model_copy(update={"adv_estimator": "grpo"})
    text = _description(config.model_copy(update={"algorithm": algorithm}), tmp_path / "a")
    assert "`eval/<split>`" in text
    assert "critic" not in text
    assert "figures" not in text


def test_resume_continues_the_same_run_with_each_step_once(tmp_path, make_config):
    first = Tracker(tmp_path / "a", make_config(steps=4))
    for step in range(4):
        first.log(step, {"reward/mean": float(step)})
        first.log_samples(step, [{"prompt": "p"}])
    first.finish("KILLED", None)
    assert client_of(first).get_run(first.run_id).info.status == "KILLED"

    again = Tracker(tmp_path / "a", make_config(steps=6), run_id=first.run_id, resume_step=2)
    assert again.run_id == first.run_id
    assert client_of(again).get_run(again.run_id).info.status == "RUNNING"
    for step in range(2, 6):
        again.log(step, {"reward/mean": float(step)})
        again.log_samples(step, [{"prompt": "p"}])
    again.finish("FINISHED", None)

    assert history(again, "reward/mean") == [(step, float(step)) for step in range(6)]
    assert [row["step"] for row in read_metrics(tmp_path / "a" / "metrics.jsonl")] == list(range(6))
    assert [row[0] for row in samples_of(again, tmp_path / "got")["data"]] == list(range(6))
    run = client_of(again).get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.num_steps"] == "4"
    assert "trainer.num_steps: 4 -> 6" in run.data.tags["changed_at_step_2"]
    assert "config-step-000002.yaml" in paths_of(again)
    assert len(client_of(again).search_runs([run.info.experiment_id])) == 1


def test_steps_that_mlflow_missed_are_sent_on_resume(tmp_path, make_config):
    off = Tracker(tmp_path / "a", make_config(mlflow=False))
    assert off.run_id is None
    for step in range(3):
        off.log(step, {"reward/mean": float(step)})
    off.finish("KILLED", None)
    on = Tracker(tmp_path / "a", make_config(), resume_step=3)
    on.log(3, {"reward/mean": 3.0})
    on.finish("FINISHED", None)
    assert history(on, "reward/mean") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_run_that_the_store_lost_starts_anew_with_all_metrics(tmp_path, make_config, caplog):
    first = Tracker(tmp_path / "a", make_config())
    first.log(0, {"reward/mean": 0.5})
    first.finish("KILLED", None)
    other = make_config(mlflow_uri=f"sqlite:///{tmp_path}/other.db")
    new = Tracker(tmp_path / "a", other, run_id="0" * 32, resume_step=1)
    assert new.run_id != "0" * 32
    assert "is not in this store any more" in caplog.text
    new.finish("FINISHED", None)
    assert history(new, "reward/mean") == [(0, 0.5)]


def test_an_outage_costs_no_step_and_no_metric(tmp_path, make_config, monkeypatch, caplog):
    tracker = Tracker(tmp_path / "a", make_config())
    real = tracker._sink._client.log_batch

    def down(*args, **kwargs):
        raise ConnectionError("server down")

    monkeypatch.setattr(tracker._sink._client, "log_batch", down)
    for step in range(3):
        tracker.log(step, {"reward/mean": float(step)})
        wait_until(lambda attempts=step + 1: tracker._sink.outbox.failures == attempts)
    assert len(read_metrics(tmp_path / "a" / "metrics.jsonl")) == 3
    assert history(tracker, "reward/mean") == []
    assert caplog.text.count("server down") == 1

    monkeypatch.setattr(tracker._sink._client, "log_batch", real)
    tracker.log(3, {"reward/mean": 3.0})
    tracker.finish("FINISHED", None)
    assert history(tracker, "reward/mean") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert history(tracker, "tracking/mlflow_failures") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_finish_has_a_deadline_and_says_what_was_not_sent(tmp_path, make_config, monkeypatch, caplog):
    tracker = Tracker(tmp_path / "a", make_config())
    monkeypatch.setattr(tracker._sink._client, "log_batch", lambda *a, **k: time.sleep(1.5))
    tracker.log(0, {"reward/mean": 0.0})
    began = time.monotonic()
    tracker.finish("FINISHED", {}, deadline_s=0.3)
    assert time.monotonic() - began < 1.2
    assert "did not get the last 3 calls" in caplog.text
    tracker._sink.outbox.close(10)


def test_the_display_gets_metrics_and_warnings(tmp_path, make_config, monkeypatch):
    display = Display()
    tracker = Tracker(tmp_path / "a", make_config(), display=display)

    def down(*args, **kwargs):
        raise ConnectionError("down")

    monkeypatch.setattr(tracker._sink._client, "log_artifact", down)
    metrics = {"eval/val/accuracy": 0.5, "critic/coverage/0.5": 0.5}
    tracker.log(0, metrics)
    tracker.finish("FAILED", None)
    assert display.steps == [(0, metrics)]
    assert len(display.notes) == 2
    assert "figures/calibration/step-000000.png not sent (kept, sent later): ConnectionError: down" in display.notes[0]
    assert "MLflow did not get the last 1 calls" in display.notes[1]
    assert client_of(tracker).get_run(tracker.run_id).info.status == "FAILED"


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@127.0.0.1:1",
        "postgresql://me:hunter2@127.0.0.1:1/db",
        "sqlite:////dev/null/mlflow.db",
        "nonsense://x",
    ],
)
def test_an_unreachable_store_is_one_clear_line(tmp_path, make_config, uri):
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        Tracker(tmp_path / "a", make_config(mlflow_uri=uri))
    assert time.monotonic() - began < 15
    text = str(caught.value)
    assert "\n" not in text
    assert "tracking.mlflow=false" in text
    assert "hunter2" not in text


def test_a_server_that_never_answers_is_given_up_in_time(tmp_path, make_config, monkeypatch):
    assert store._START_TIMEOUTS == {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    monkeypatch.setitem(store._START_TIMEOUTS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setitem(store._START_TIMEOUTS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        began = time.monotonic()
        with pytest.raises(TrackingError, match="timed out"):
            Tracker(tmp_path / "a", make_config(mlflow_uri=f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert time.monotonic() - began < 6


def test_a_deleted_experiment_is_told(tmp_path, make_config):
    tracker = Tracker(tmp_path / "a", make_config(experiment="gone"))
    tracker.finish("FINISHED", None)
    experiment = client_of(tracker).get_experiment_by_name("gone")
    client_of(tracker).delete_experiment(experiment.experiment_id)
    with pytest.raises(TrackingError, match="'gone' was deleted"):
        Tracker(tmp_path / "b", make_config(experiment="gone"))


def test_a_run_says_in_words_what_is_wrong(tmp_path, make_config):
    display = Display()
    tracker = Tracker(tmp_path / "a", make_config(), display=display)
    for step in range(1, 6):
        tracker.log(step, {"policy/clip_fraction": 0.7})
    tracker.finish("KILLED", None)
    assert len(display.notes) == len(tracker.advice) == 1
    assert "[clip_fraction_high] 70% of the tokens are clipped" in display.notes[0]
    again = Tracker(tmp_path / "a", make_config(), run_id=tracker.run_id, resume_step=6, display=display)
    again.log(6, {"policy/clip_fraction": 0.7})
    again.finish("FINISHED", None)
    assert len(display.notes) == 1, "what was said before the run was cut off is not said again"
