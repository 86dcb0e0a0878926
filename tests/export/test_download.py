"""Runs at URLs are exported and evaluated like runs in local folders."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from upath import UPath

from dvpo_service.commands.train import export_final
from dvpo_service.errors import CheckpointError, UserError
from dvpo_service.export import download
from dvpo_service.export.download import local_copy
from dvpo_service.export.export import export, open_export
from dvpo_service.export.states import newest
from dvpo_service.runs.directory import RunDir
from dvpo_service.runs.storage import files_below, written_locally
from tests.builders import make_config
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


def exported(place: UPath, content: str) -> None:
    """Write an export to the run at ``place``: every file, and the id of the upload, is ``content``."""
    for name in ("config.json", "model.safetensors", "critic/config.json"):
        (place / "policy" / name).write_text(content)
    (place / "policy" / "export.json").write_text(json.dumps({"step": 4, "upload": content}))


@pytest.mark.parametrize("writer_finishes", [True, False])
def test_an_export_that_is_replaced_while_it_is_read_is_never_half_read(
    bucket: str, monkeypatch: pytest.MonkeyPatch, writer_finishes: bool
) -> None:
    """The writer removes the marker, then replaces the files one by one; the reader is in between."""
    place = UPath(f"{bucket}/runs/replaced-{writer_finishes}")
    exported(place, "old")
    copy, calls = download._copy, []

    def copy_while_the_run_writes(source: UPath, files: list[str], target: Path) -> Path:
        calls.append(target)
        if len(calls) == 1:
            (place / "policy" / "export.json").unlink()
            (place / "policy" / "model.safetensors").write_text("new")
            done = copy(source, [f for f in files if not f.endswith("export.json")], target)
            if writer_finishes:
                exported(place, "new")
            return done
        return copy(source, files, target)

    monkeypatch.setattr(download, "_copy", copy_while_the_run_writes)
    if not writer_finishes:  # its run was killed: there is no export
        with pytest.raises(CheckpointError, match="holds nothing to export"), local_copy(str(place)):
            pass
        return
    with local_copy(str(place)) as local:
        read = {
            file.read_text() for file in (local / "policy").rglob("*") if file.is_file() and file.name != "export.json"
        }
        assert read == {"new"}


def test_an_export_that_is_always_replaced_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = UPath(f"{bucket}/runs/restless")
    exported(place, "0")
    copy, count = download._copy, itertools.count(1)

    def copy_and_replace(source: UPath, files: list[str], target: Path) -> Path:
        done = copy(source, files, target)
        exported(place, str(next(count)))
        return done

    monkeypatch.setattr(download, "_copy", copy_and_replace)
    with pytest.raises(CheckpointError, match="was rewritten 3 times while it was read"), local_copy(str(place)):
        pass


def test_a_run_exports_to_a_url_with_the_marker_last(bucket: str, tmp_path: Path) -> None:
    place = UPath(f"{bucket}/runs/exporting")
    exported(place, "old")
    (place / "policy" / "model-00002-of-00002.safetensors").write_text("of a larger model")
    seen: list[list[str]] = []

    class Trainer:
        def export(self, folder: UPath) -> None:
            seen.append(files_below(place / "policy"))
            with written_locally(str(folder)) as local:
                (Path(local) / "config.json").write_text("{}")

    roles: Any = SimpleNamespace(policy=Trainer(), estimator=Trainer(), tracker=SimpleNamespace(run_id=None))
    run = RunDir(place)
    export_final(make_config("some/model"), roles, run, 4)
    assert seen == [[], ["config.json"]], "the old export is gone before the new one begins"
    wanted = ["README.md", "config.json", "config.yaml", "critic/config.json", "export.json"]
    assert files_below(place / "policy") == wanted
    first = (place / "policy" / "export.json").read_text()
    export_final(make_config("some/model"), roles, run, 4)
    place.fs.invalidate_cache()
    assert (place / "policy" / "export.json").read_text() != first, "a reader can tell two exports of a step apart"


def test_the_marker_is_copied_last(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    place = UPath(f"{bucket}/runs/order")
    put_file: Any = place.fs.put_file
    order = []

    def recording(source: str, target: str) -> None:
        order.append(Path(target).name)
        put_file(source, target)

    monkeypatch.setattr(place.fs, "put_file", recording)
    with written_locally(str(place), last="b.json") as local:
        for name in ("a.json", "b.json", "c.json"):
            (Path(local) / name).write_text("{}")
    assert order[-1] == "b.json"
    assert sorted(order) == ["a.json", "b.json", "c.json"]
