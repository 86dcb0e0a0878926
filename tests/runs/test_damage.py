"""A damaged checkpoint is never loaded: the one before it is, or an error of one line says what to do."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_service.errors import CheckpointError
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.integrity import Written
from dvpo_service.runs.remote_checkpoint import checkpoints_of
from dvpo_service.runs.storage import StoragePath
from tests.builders import sums_of

STEPS = (2, 4)
DAMAGES = ("truncate", "flip", "remove", "swap", "empty", "extra")


def write_two(checkpoints: Checkpoints) -> None:
    """Write two checkpoints of two parts with two shards each; no two files are the same."""
    for step in STEPS:

        def part(folder: StoragePath, step: int = step) -> Written:
            for n in (1, 2):
                (folder / f"shard-{n}").write_bytes(f"{folder.name} {step} {n} ".encode() * 7)
            return Written(sums_of(folder))

        checkpoints.begin(step, {"policy": part, "estimator": part}, {"state": {"step": step}, "stream": {"taken": 3}})
        checkpoints.finish()


def damage(folder: Path, kind: str, which: int, where: float, bit: int) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file, other = files[which % len(files)], files[(which + 1) % len(files)]
    data = file.read_bytes()
    at = int(where * (len(data) - 1))
    if kind == "truncate":
        file.write_bytes(data[:at])
    elif kind == "flip":
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
    elif kind == "remove":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        (file.parent / "shard-3").write_bytes(data)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two checkpoints. Read only."""
    run = tmp_path_factory.mktemp("two")
    write_two(Checkpoints(run, keep=2))
    return run


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(DAMAGES),
    which=st.integers(0, 4),
    where=st.floats(0, 1),
    bit=st.integers(0, 7),
    both=st.booleans(),
)
def test_whatever_is_damaged_is_not_loaded(
    two: Path, kind: str, which: int, where: float, bit: int, both: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(shutil.copytree(two, f"{name}/run"))
        lines: list[str] = []
        checkpoints = Checkpoints(run, keep=2)
        record = {"state": {"step": 4}, "stream": {"taken": 3}}
        for step in STEPS if both else STEPS[1:]:
            damage(run / "checkpoints" / f"step-{step:06d}", kind, which, where, bit)
        latest = None
        message = ""
        try:
            latest = checkpoints.latest(lines.append)
        except CheckpointError as error:
            message = str(error)
        if message:
            assert both
            assert "\n" not in message
            assert "trainer.resume=never" in message
            with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
                Checkpoints(run, keep=2).latest()  # the next start does not silently begin anew either
            return
        if latest is None:  # a checkpoint without state.json counts as not finished
            assert both
            assert kind == "remove"
            return
        if (
            latest.folder.name == "step-000004"
        ):  # the flipped bit left the same JSON: it has several ways to write a value
            assert latest.record == record
            assert kind == "flip"
            return
        assert latest.record == record | {"state": {"step": 2}}
        if kind != "remove" or lines:
            [line] = lines
            assert "step-000004 is damaged: " in line
            assert line.endswith("; continuing from step-000002")
            assert (run / "checkpoints" / "damaged-step-000004").is_dir()


def test_one_bit_anywhere_in_the_record_is_noticed_or_means_the_same(two: Path, tmp_path: Path) -> None:
    data = (two / "checkpoints/step-000004/state.json").read_bytes()
    copy = tmp_path / "copy"
    for at in range(0, len(data), 3):
        shutil.copytree(two / "checkpoints", copy / "checkpoints")
        flipped = data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        (copy / "checkpoints/step-000004/state.json").write_bytes(flipped)
        checkpoints = Checkpoints(copy, keep=2)
        latest = checkpoints.latest(lambda line: None)
        assert latest
        assert latest.record["state"]["step"] == 2 or latest.record == {"state": {"step": 4}, "stream": {"taken": 3}}
        shutil.rmtree(copy)


def test_a_record_without_checksums_is_not_believed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    lines: list[str] = []
    write_two(checkpoints)
    (tmp_path / "checkpoints/step-000004/state.json").write_text(json.dumps({"state": {"step": 4}}))
    latest = checkpoints.latest(lines.append)
    assert latest
    assert latest.record["state"]["step"] == 2
    assert "has no checksums" in lines[0]


def test_a_folder_under_another_steps_name_is_not_that_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write_two(checkpoints)
    (tmp_path / "checkpoints/step-000002").rename(tmp_path / "checkpoints/step-000009")
    latest = checkpoints.latest(lambda line: None)
    assert latest
    assert latest.record["state"]["step"] == 4


def test_at_a_url_the_marker_gets_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = RunDir(f"memory://damaged/{tmp_path.name}")
    run.open()
    checkpoints = checkpoints_of(run, keep=2)
    lines: list[str] = []
    write_two(checkpoints)
    for step, expected in ((4, 2), (2, None)):
        shard = checkpoints.folder / f"step-{step:06d}" / "policy" / "shard-2"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        if expected is None:
            with pytest.raises(CheckpointError, match=r"policy/shard-2 differs.*No whole checkpoint is left"):
                checkpoints.latest(lines.append)
            continue
        latest = checkpoints.latest(lines.append)
        assert latest
        assert latest.record["state"]["step"] == expected
        assert (checkpoints.folder / f"step-{step:06d}" / "state.json.damaged").exists()
    assert "continuing from step-000002" in lines[0]
    with pytest.raises(CheckpointError, match=r"state\.json\.damaged is damaged"):
        checkpoints_of(run, keep=2).latest()
    write_two(checkpoints)
    latest = checkpoints.latest()
    assert latest
    assert latest.record["state"]["step"] == 4
