"""Packing and unpacking of model folders. tests/e2e/test_netns.py tests that nodes on other hosts get them."""

from __future__ import annotations

from pathlib import Path

from actors.cluster.model_broadcast import listing, packed, read_text, unpack


def model(folder: Path) -> Path:
    (folder / "nested").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "nested" / "weights").write_bytes(b"\x00\x01" * 500)
    return folder


def test_a_folder_arrives_as_it_was(tmp_path: Path) -> None:
    source = model(tmp_path / "here")
    target = tmp_path / "away" / "there"
    assert listing(target) is None
    assert unpack(target, packed(source)) is None
    assert listing(target) == listing(source) == {"config.json": 2, "nested/weights": 1000}
    assert (target / "nested/weights").read_bytes() == (source / "nested/weights").read_bytes()
    assert [p.name for p in target.parent.iterdir()] == ["there"], "nothing is left beside it"


def test_a_folder_that_came_meanwhile_stays(tmp_path: Path) -> None:
    source = model(tmp_path / "here")
    target = tmp_path / "there"
    target.mkdir()
    assert unpack(target, packed(source)) is None
    assert listing(target) == {}


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    why = unpack(tmp_path / "file" / "folder" / "there", packed(model(tmp_path / "here")))
    assert why == "Not a directory"


def test_a_marker_is_read_or_it_is_said_why_not(tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("token")
    assert read_text(str(tmp_path / "marker")) == "token"
    assert read_text(str(tmp_path / "none")).startswith("FileNotFoundError")
    assert read_text("memory://nowhere/marker").startswith("FileNotFoundError")
