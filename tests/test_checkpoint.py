"""Checkpoints: whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dvpo_service.checkpoint import Checkpoints
from dvpo_service.config import load_config, to_yaml
from dvpo_service.errors import CheckpointError
from dvpo_service.resume import resume_point


def write(text: str):
    return lambda folder: (folder / "data").write_text(text)


def test_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 100):
        checkpoints.save(step, {"policy": write(str(step))}, {"step": step})
    found = checkpoints.latest()
    assert found is not None
    assert found.record == {"step": 100}
    assert (found.folder / "policy" / "data").read_text() == "100"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000100"]


def test_a_save_that_fails_leaves_the_last_one_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"policy": write("good")}, {"step": 1})

    def full(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-000002: No space left.*free some space"):
        checkpoints.save(2, {"policy": full}, {"step": 2})
    found = checkpoints.latest()
    assert found is not None
    assert found.record == {"step": 1}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_torn_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"policy": write("good")}, {"step": 1})
    (tmp_path / "checkpoints" / "step-000002" / "policy").mkdir(parents=True)
    found = checkpoints.latest()
    assert found is not None
    assert found.record == {"step": 1}


def test_an_unreadable_record_names_the_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    folder = checkpoints.save(1, {}, {"step": 1})
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-000001/state\.json: cannot be read"):
        checkpoints.latest()


def test_a_run_does_not_continue_with_another_critic(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(5, {"policy": write("weights")}, {"state": {"step": 5}})
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("demo")))
    same = resume_point(load_config("demo", ["critic.optim.lr=1e-3"]), checkpoints)
    assert same is not None
    with pytest.raises(CheckpointError, match=r"algorithm\.adv_estimator=dvpo, the config now has grpo; give the old"):
        resume_point(load_config("demo", ["algorithm.adv_estimator=grpo"]), checkpoints)
    assert resume_point(load_config("demo-grpo", ["trainer.resume=never"]), checkpoints) is None


def test_starting_over_keeps_the_old_run_and_reads_none_of_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(90, {}, {"state": {"step": 90}})
    (tmp_path / "policy").mkdir()
    checkpoints.set_aside()
    assert checkpoints.latest() is None
    assert not (tmp_path / "policy").exists()
    checkpoints.save(2, {}, {"state": {"step": 2}})
    found = checkpoints.latest()
    assert found
    assert found.record["state"]["step"] == 2, "nor is it pruned for the old run's sake"
    [old] = tmp_path.glob("checkpoints-before-*")
    assert (old / "step-000090" / "state.json").is_file()
