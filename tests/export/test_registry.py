"""Exports become versions of a model in a real MLflow registry, on SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from dvpo_service.config import to_yaml
from dvpo_service.config.schema import TrackingConfig
from dvpo_service.errors import TrackingError
from dvpo_service.export.export import export, export_and_register
from dvpo_service.export.states import run_config
from dvpo_service.tracking import registry
from dvpo_service.tracking.registry import register, registry_uri
from dvpo_service.tracking.store import default_tracking_uri, open_store
from tests.builders import make_config


@pytest.fixture
def local_run(run: Path) -> Path:
    """Return a run whose MLflow store is the SQLite file beside its folder."""
    config = run_config(run)
    tracking = config.tracking.model_copy(update={"mlflow_uri": None})
    (run / "config.yaml").write_text(to_yaml(config.model_copy(update={"tracking": tracking})))
    open_store(default_tracking_uri(run))
    return run


def test_a_run_that_was_moved_has_no_registry(run: Path, tmp_path: Path) -> None:
    config = run_config(run).model_copy(update={"tracking": TrackingConfig()})
    with pytest.raises(TrackingError, match=r"mlflow\.db is not here"):
        registry_uri(config, run)
    assert not (run.parent / "mlflow.db").exists(), "none is made"


def test_every_export_becomes_a_version_of_the_model(local_run: Path, tmp_path: Path) -> None:
    done, version = export_and_register(local_run, tmp_path / "out", "arithmetic")
    _, second = export_and_register(done.folder, done.folder, None)
    assert (version, second) == ("1", None)
    _, third = export_and_register(local_run, tmp_path / "other", "arithmetic")
    assert third == "2"
    client = MlflowClient(default_tracking_uri(local_run))
    kept = client.get_model_version("arithmetic", "1")
    assert kept.source == done.folder.as_uri()
    assert kept.run_id == "run-7"
    assert kept.tags == {"step": "3"}


def test_a_server_gets_the_folder_itself(local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = export(local_run, tmp_path / "out")
    uri = default_tracking_uri(local_run)
    client = open_store(uri)
    mlflow_run = client.create_run(client.create_experiment("e", (tmp_path / "artifacts").as_uri())).info.run_id
    monkeypatch.setattr(registry, "sqlite_path", lambda uri: None)  # as if the store were a server
    version = register(client, uri, "arithmetic", done.folder, step=3, run_id=mlflow_run)
    kept = client.get_model_version("arithmetic", version)
    assert kept.source == f"runs:/{mlflow_run}/export/step-000003"
    files = {f.path.rpartition("/")[2] for f in client.list_artifacts(mlflow_run, "export/step-000003")}
    assert {"model.safetensors", "critic", "README.md"} <= files
    with pytest.raises(TrackingError, match="its run is not known to MLflow"):
        register(client, uri, "arithmetic", done.folder, step=3, run_id=None)


def test_where_there_is_no_registry(
    trained: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(trained, tmp_path / "out").folder
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="its password is masked, as in every file of a run"):
        registry_uri(run_config(folder), folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host")
    assert registry_uri(run_config(folder), folder) == "http://me:hunter2@host"
    config = make_config(tiny_model, tracking={"mlflow": False})
    with pytest.raises(TrackingError, match="the run had no MLflow"):
        registry_uri(config, tmp_path)
    config = make_config(tiny_model, tracking={"mlflow_uri": "http://127.0.0.1:9"})
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 cannot be used"):
        export_and_register(folder, tmp_path / "again", "arithmetic")
    assert not (tmp_path / "again").exists(), "the store is tried first"
