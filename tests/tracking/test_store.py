"""Open an MLflow store on SQLite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dvpo_service.errors import TrackingError
from dvpo_service.tracking.store import artifact_root, default_tracking_uri, open_store


def test_runs_that_start_together_in_a_new_folder_share_its_store(tmp_path):
    code = (
        "import sys; from dvpo_service.tracking.mlflow_sink import experiment_id, open_store;"
        "print(experiment_id(open_store(sys.argv[1]), 'exp', sys.argv[1]))"
    )
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    started = [
        subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0] * 3, outputs
    assert len({out for out, _ in outputs}) == 1, "one experiment"


def test_the_default_store_stands_beside_the_run_folders(tmp_path: Path) -> None:
    assert default_tracking_uri(tmp_path / "runs" / "x") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    with pytest.raises(TrackingError, match=r"'\?' in its name; give another --run-dir, or tracking\.mlflow_uri"):
        default_tracking_uri(tmp_path / "why?" / "x")


@pytest.mark.parametrize("name", ["a#3", "50%", "a b", "é~"])
def test_a_store_lands_in_its_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    run = tmp_path / name / "run"
    run.mkdir(parents=True)
    uri = default_tracking_uri(run)
    client = open_store(uri)
    experiment = client.create_experiment("x", artifact_location=artifact_root(uri))
    mlflow_run = client.create_run(experiment).info.run_id
    client.log_text(mlflow_run, "words", "note.txt")
    assert [a.path for a in client.list_artifacts(mlflow_run)] == ["note.txt"]
    assert (tmp_path / name / "mlflow.db").is_file()
