"""A run that is finished: the same command starts nothing, and settings that never ran are not written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvpo_service.commands.finished import finished, say_finished
from dvpo_service.config import Config, load_config
from dvpo_service.errors import CheckpointError
from dvpo_service.runs.settings import record_settings, settings_changes


def config(*overrides: str) -> Config:
    return load_config("demo", ["trainer.num_steps=4", "tracking.mlflow=false", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record_settings(tmp_path, config(), 0)
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 4}))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "export.json").write_text(json.dumps({"step": 4}))
    return tmp_path


def test_the_same_command_again_has_nothing_to_do(run: Path) -> None:
    summary = finished(config(), run)
    assert summary == {"steps": 4}
    line = say_finished(config(), run, summary)
    assert "is already finished at step 4: nothing was started" in line
    assert "trainer.num_steps=8" in line


def test_settings_that_would_not_be_used_are_listed_and_nothing_is_written(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError) as refused:
        finished(config("policy.optim.lr=1e-3", "data.val_files={mine: [x.jsonl]}", "trainer.num_steps=3"), run)
    for change in ("policy.optim.lr: 0.0002 -> 0.001", "data.val_files.mine: - -> ", "trainer.num_steps: 4 -> 3"):
        assert change in str(refused.value)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_settings_that_train_nothing_may_differ(run: Path) -> None:
    assert finished(config("cluster.num_cpus=3", "tracking.experiment=other", "serve.port=1"), run)


@pytest.mark.parametrize("override", ["trainer.num_steps=5", "trainer.resume=never"])
def test_more_steps_and_a_new_start_are_work(run: Path, override: str) -> None:
    assert finished(config(override, "policy.optim.lr=1e-3"), run) is None


@pytest.mark.parametrize("missing", ["summary.json", "policy/export.json"])
def test_a_run_that_was_cut_off_at_its_end_is_not_finished(run: Path, missing: str) -> None:
    (run / missing).unlink()
    assert finished(config(), run) is None


def test_an_export_of_another_step_does_not_finish_the_run(run: Path) -> None:
    (run / "policy" / "export.json").write_text(json.dumps({"step": 2}))
    assert finished(config(), run) is None


def test_what_an_outage_kept_back_is_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    class Recorder:
        def __init__(self, folder: Path, config: Config, *, run_id: str | None, resume_step: int) -> None:
            sent.append((folder, run_id, resume_step))

        def finish(self, status: str, summary: object) -> None:
            sent.append(status)

    monkeypatch.setattr("dvpo_service.tracking.tracker.Tracker", Recorder)
    summary = {"steps": 4, "where": {"mlflow_run_id": "run-7"}}
    tracked = config("tracking.mlflow=true")
    say_finished(tracked, run, summary)
    assert sent == []
    (run / "mlflow-unsent").mkdir()
    assert "MLflow was sent what it had not got yet" in say_finished(tracked, run, summary)
    assert sent == [(run, "run-7", 5), "FINISHED"]


def test_settings_are_kept_by_the_step_from_which_they_held(tmp_path: Path) -> None:
    assert record_settings(tmp_path, config(), 0) == []
    assert record_settings(tmp_path, config(), 2) == []
    assert record_settings(tmp_path, config("policy.optim.lr=1e-3"), 2) == ["policy.optim.lr: 0.0002 -> 0.001"]
    assert settings_changes(tmp_path, 4) == {2: ["policy.optim.lr: 0.0002 -> 0.001"]}
    assert settings_changes(tmp_path, 2) == {}
    # That start trained nothing: the next one goes on from the same step as before.
    assert record_settings(tmp_path, config(), 2) == []
    assert settings_changes(tmp_path, 4) == {}
    assert load_config(str(tmp_path / "config.yaml")).policy.optim.lr == 2e-4
    assert record_settings(tmp_path, config("policy.optim.lr=5e-4"), 0) == [], "a new start"
    assert len((tmp_path / "settings.jsonl").read_text().splitlines()) == 1


def test_a_run_of_a_version_without_the_file_is_compared_with_its_config(tmp_path: Path) -> None:
    record_settings(tmp_path, config(), 0)
    (tmp_path / "settings.jsonl").unlink()
    record_settings(tmp_path, config("policy.optim.lr=1e-3"), 2)
    assert settings_changes(tmp_path, 4) == {2: ["policy.optim.lr: 0.0002 -> 0.001"]}
