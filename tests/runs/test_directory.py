"""Run directories: where a relative one ends up, and runs at a URL (S3, memory and file systems)."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.errors import CheckpointError, UserError
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.runs.directory import JOB_CONFIG, RunDir, resolve_run_dir
from dvpo_service.runs.integrity import Written
from dvpo_service.runs.remote_checkpoint import checkpoints_of
from dvpo_service.runs.storage import StoragePath, read_locally, written_locally
from tests.builders import sums_of


@pytest.fixture(params=["s3", "memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an unused run directory; only the environment configures the access to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "memory":
        return f"memory://bucket/{uuid.uuid4().hex}/demo"
    if request.param == "file":
        return f"file://{tmp_path}/shared/demo"
    return f"{request.getfixturevalue('bucket')}/runs/demo"


def write(text: str) -> Any:
    def part(folder: StoragePath) -> Written:
        with written_locally(str(folder)) as local:
            (Path(local) / "data").write_text(text)
        return Written(sums_of(folder))

    return part


def save(checkpoints: Checkpoints, step: int, parts: dict[str, Any] | None = None) -> None:
    checkpoints.begin(step, parts or {}, {"state": {"step": step}})
    checkpoints.finish()


def opened(url: str) -> RunDir:
    run = RunDir(url)
    run.open()
    return run


def test_a_relative_run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVPO_RUNS", raising=False)
    assert resolve_run_dir(None, None, "demo") == tmp_path / "runs/demo"
    assert resolve_run_dir("here", "there", "demo") == tmp_path / "here"
    assert resolve_run_dir(None, "there", "demo") == tmp_path / "there"
    assert str(resolve_run_dir("s3://bucket/x", None, "demo")) == "s3://bucket/x"
    monkeypatch.setenv("DVPO_RUNS", "s3://bucket/runs")
    assert str(resolve_run_dir(None, None, "demo")) == "s3://bucket/runs/demo"
    monkeypatch.setenv("DVPO_RUNS", "/shared")
    assert resolve_run_dir("mine", None, "demo") == Path("/shared/mine")
    assert resolve_run_dir("/else/where", None, "demo") == Path("/else/where")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_run_dir("~/mine", None, "demo") == tmp_path / "home/mine"
    monkeypatch.setenv("DVPO_RUNS", "~/runs")
    assert resolve_run_dir("mine", None, "demo") == tmp_path / "home/runs/mine"


def test_in_a_job_it_is_not_in_the_copy_that_ray_throws_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(JOB_CONFIG, "{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DVPO_RUNS", raising=False)
    assert resolve_run_dir(None, None, "demo") == tmp_path / "home/dvpo-runs/demo"


def test_a_checkpoint_comes_back_and_old_ones_go(url: str) -> None:
    run = opened(url)
    checkpoints = checkpoints_of(run, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 100):
        (run.local / "metrics.jsonl").write_text(f"up to {step}")
        save(checkpoints, step, {"policy": write(str(step))})
    names = {p.name for p in checkpoints.folder.iterdir()}
    assert names == {"step-000010", "step-000100"}

    for file in run.local.iterdir():
        file.unlink()  # as if another machine continues
    again = opened(url)
    latest = checkpoints_of(again, keep=2).latest()
    assert latest is not None
    assert latest.record == {"state": {"step": 100}}
    with read_locally(str(latest.folder / "policy")) as local:
        assert (Path(local) / "data").read_text() == "100"
    assert (again.local / "metrics.jsonl").read_text() == "up to 100"


def test_what_a_later_crash_left_locally_gives_way_to_the_url(url: str) -> None:
    run = opened(url)
    (run.local / "metrics.jsonl").write_text("of a run whose URL was emptied since")
    assert not (opened(url).local / "metrics.jsonl").exists()


def test_without_its_marker_a_checkpoint_does_not_count(url: str) -> None:
    checkpoints = checkpoints_of(opened(url), keep=2)
    save(checkpoints, 1, {"policy": write("good")})

    def broken(folder: StoragePath) -> None:
        write("half")(folder)
        raise OSError("the network is gone")

    with pytest.raises(CheckpointError, match=r"step-000002: the network is gone"):
        save(checkpoints, 2, {"policy": broken})
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.record["state"]["step"] == 1
    save(checkpoints, 2, {"policy": write("whole")})
    latest = checkpoints.latest()
    assert latest is not None
    with read_locally(str(latest.folder / "policy")) as local:
        assert [(f.name, f.read_text()) for f in Path(local).iterdir()] == [("data", "whole")]


def test_the_older_of_two_runs_ends_at_its_next_checkpoint(url: str) -> None:
    older = checkpoints_of(opened(url), keep=2)
    save(older, 1)
    newer = checkpoints_of(opened(url), keep=2)
    with pytest.raises(CheckpointError, match=r"was taken over by process \d+ on .*--run-dir"):
        save(older, 2)
    save(newer, 3)
    assert {p.name for p in newer.folder.iterdir()} == {"step-000001", "step-000003"}


def test_a_store_that_cannot_be_used_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x cannot be used: .*AWS_ENDPOINT_URL"):
        opened("s3://no-such-bucket/x")
    with pytest.raises(UserError, match=r"nosuch://x/y: .*"):
        RunDir("nosuch://x/y")
