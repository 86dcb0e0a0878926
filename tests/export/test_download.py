"""Runs at URLs are exported and evaluated like runs in local folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from upath import UPath

from dvpo_service.errors import CheckpointError, UserError
from dvpo_service.export.download import local_copy
from dvpo_service.export.export import export, newest, open_export
from tests.export.conftest import STEP


def put(folder: Path, url: str) -> UPath:
    place = UPath(url)
    for file in folder.rglob("*"):
        if file.is_file():
            (place / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    return place


def differing(one: Path, other: Path) -> list[str]:
    names = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(other)) for p in other.rglob("*") if p.is_file()}
    return [n for n in names if (one / n).read_bytes() != (other / n).read_bytes()]


def test_a_run_a_checkpoint_and_an_export_at_a_url(run: Path, bucket: str, tmp_path: Path) -> None:
    older = Path(shutil.copytree(run / "checkpoints" / f"step-{STEP:06d}", run / "checkpoints" / "step-000001"))
    (older / "state.json").write_text(json.dumps({"state": {"step": 1}}))
    torn = run / "checkpoints" / "step-000009" / "policy"
    torn.mkdir(parents=True)
    (torn / "weights").write_text("no state.json")
    wanted = export(run, tmp_path / "wanted").folder
    place = put(run, f"{bucket}/runs/x")
    for source in (f"{bucket}/runs/x", f"{bucket}/runs/x/checkpoints/step-{STEP:06d}"):
        with local_copy(source) as local:
            assert newest(local)[0] == STEP
            assert not list(local.rglob("step-000001")), "one state, not all of them"
            assert differing(export(local, tmp_path / "out").folder, wanted) == []
        assert not local.exists()
    put(wanted, f"{place}/policy")
    for source in (f"{bucket}/runs/x", f"{bucket}/runs/x/policy"):
        with local_copy(source) as local:
            assert newest(local)[0] == STEP
            assert not list(local.rglob("checkpoints")), "at equal steps policy/, which is exported already"
            assert differing(export(local, tmp_path / "out").folder, wanted) == []
    assert open_export(tmp_path / "out").step == STEP


def test_a_path_is_itself(tmp_path: Path) -> None:
    with local_copy(str(tmp_path)) as local:
        assert local == tmp_path


def test_what_is_not_there_is_one_line(bucket: str) -> None:
    with pytest.raises(CheckpointError, match="holds nothing to export"), local_copy(f"{bucket}/nothing"):
        pass
    with (
        pytest.raises(CheckpointError, match=r"cannot be read: .*credentials"),
        local_copy("s3://no-such-bucket-here/x"),
    ):
        pass
    with pytest.raises(UserError), local_copy("nonsense://x"):
        pass
