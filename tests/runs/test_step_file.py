"""metrics.jsonl: each step once, strict JSON, nothing lost by a crash."""

from __future__ import annotations

import json
import math

import pytest

from dvpo_service.errors import TrackingError
from dvpo_service.runs.step_file import MetricsFile, read_metrics
from dvpo_service.tracking.samples import SamplesFile


def written(path, steps):
    file = MetricsFile(path)
    for step in steps:
        file.write(step, {"reward/mean": step / 10})
    return file


def test_a_step_is_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    written(path, [0])
    (row,) = (json.loads(line) for line in path.read_text().splitlines())
    assert row["step"] == 0
    assert row["reward/mean"] == 0.0
    assert row["time"] > 1e9


def test_non_finite_values_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
    row = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"not JSON: {c}"))
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, 1.0)


def test_resuming_removes_the_steps_that_are_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(5)).close()
    again = MetricsFile(path, resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    again.write(3, {"reward/mean": 9.0})
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(path)][2:] == [(2, 0.2), (3, 9.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    written(path, range(3)).close()

    def no_rename(*_):
        raise OSError("disk gone")

    monkeypatch.setattr("os.replace", no_rename)
    with pytest.raises(OSError, match="disk gone"):
        MetricsFile(path, resume_step=1)
    assert len(read_metrics(path)) == 3


def test_a_torn_last_line_is_left_out_and_a_broken_one_inside_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(2)).close()
    path.write_text(path.read_text() + '{"step": 2, "rew')
    MetricsFile(path, resume_step=2).write(2, {})
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    path.write_text('{"step": 0}\nrubbish\n{"step": 1}\n')
    with pytest.raises(TrackingError, match="line 2 is not JSON"):
        MetricsFile(path, resume_step=1)


def test_logging_a_step_twice_is_an_error(tmp_path):
    file = written(tmp_path / "metrics.jsonl", [0, 1])
    with pytest.raises(ValueError, match="step 1 was logged already"):
        file.write(1, {})


def test_samples_become_a_table_with_null_for_a_failed_reward(tmp_path):
    file = SamplesFile(tmp_path / "samples.jsonl")
    file.write(0, [{"response": "a", "reward": math.nan}])
    file.write(25, [{"response": "b", "reward": 1.0, "error": ""}])
    assert file.table() == {
        "columns": ["step", "response", "reward", "error"],
        "data": [[0, "a", None, None], [25, "b", 1.0, ""]],
    }
    file.rewind(25)
    assert len(file.table()["data"]) == 1
