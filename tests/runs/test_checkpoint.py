"""Checkpoints are either complete or absent."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvpo_service.errors import CheckpointError
from dvpo_service.runs.checkpoint import Checkpoints
from dvpo_service.runs.integrity import FORMAT, STATE_FILE, Written, _crc_of
from tests.builders import sums_of


def write(text: str) -> Any:
    def part(folder: Path) -> Written:
        (folder / "data").write_text(text)
        return Written(sums_of(folder))

    return part


def save(checkpoints: Checkpoints, step: int, parts: dict[str, Any] | None = None) -> Path:
    checkpoints.begin(step, parts or {}, {"state": {"step": step}})
    checkpoints.finish()
    return Path(str(checkpoints.whole()[-1]))


def latest_step(checkpoints: Checkpoints) -> int | None:
    latest = checkpoints.latest()
    return latest.record["state"]["step"] if latest else None


def test_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 100):
        save(checkpoints, step, {"policy": write(str(step))})
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.record == {"state": {"step": 100}}
    assert (latest.folder / "policy" / "data").read_text() == "100"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000100"]


def test_a_save_that_fails_leaves_the_last_one_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, {"policy": write("good")})

    def full(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-000002: No space left.*free some space"):
        save(checkpoints, 2, {"policy": full})
    assert latest_step(checkpoints) == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_torn_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, {"policy": write("good")})
    (tmp_path / "checkpoints" / "step-000002" / "policy").mkdir(parents=True)
    assert latest_step(checkpoints) == 1


def test_starting_over_keeps_the_old_run_and_reads_none_of_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 90)
    (tmp_path / "policy").mkdir()
    checkpoints.set_aside()
    assert checkpoints.latest() is None
    assert not (tmp_path / "policy").exists()
    save(checkpoints, 2)
    assert latest_step(checkpoints) == 2, "nor is it pruned for the old run's sake"
    [old] = tmp_path.glob("checkpoints-before-*")
    assert (old / "step-000090" / "state.json").is_file()


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change ``state.json`` as its writer would have written it."""
    file = folder / STATE_FILE
    tree = json.loads(file.read_text())
    tree.pop("crc32")
    change(tree)
    file.write_text(json.dumps({**tree, "crc32": _crc_of(tree)}))


def test_a_checkpoint_of_the_format_before_is_continued(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    rewritten(save(checkpoints, 5, {"policy": write("5")}), lambda tree: tree.pop("format"))
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.record == {"state": {"step": 5}}


def test_a_checkpoint_of_a_newer_format_is_refused_and_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    folder = save(checkpoints, 5, {"policy": write("5")})
    rewritten(folder, lambda tree: tree.update(format=FORMAT + 1))
    with pytest.raises(CheckpointError, match=rf"step-000005 has format {FORMAT + 1}, .* up to {FORMAT}; go on"):
        checkpoints.latest()
    assert (folder / STATE_FILE).is_file(), "it is not damaged: nothing was renamed"
