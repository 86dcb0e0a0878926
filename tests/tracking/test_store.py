"""Open an MLflow store on SQLite."""

from __future__ import annotations

import subprocess
import sys


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
