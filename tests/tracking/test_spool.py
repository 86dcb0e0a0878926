"""Artifacts wait in files: the newest version of each, up to a size limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvpo_service.tracking.spool import Spool


def text(content: str):
    return lambda file: file.write_text(content)


def test_a_file_stays_until_it_is_sent_also_for_the_next_process(tmp_path: Path) -> None:
    spool, got = Spool(tmp_path / "s", fresh=True), []
    spool.add("figures/b.png", text("b"))
    spool.add("a.json", text("a"))
    assert spool.waiting() == ["figures/b.png", "a.json"]

    def down(file: Path) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        spool.send("a.json", down)
    again = Spool(tmp_path / "s", fresh=False)
    for path in again.waiting():
        again.send(path, lambda file: got.append(file.read_text()))
        again.send(path, lambda file: got.append("twice"))
    assert got == ["b", "a"]
    assert again.waiting() == []


def test_what_was_made_anew_while_it_was_sent_waits_still(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", fresh=True)
    spool.add("a.json", text("old"))
    spool.send("a.json", lambda file: spool.add("a.json", text("new")))
    assert [(spool.folder / p).read_text() for p in spool.waiting()] == ["new"]


def test_the_oldest_go_beyond_the_bound_and_another_run_starts_empty(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", fresh=True, limit_mib=2.5 / 1024)
    for i in range(5):
        spool.add(f"{i}.png", text("x" * 1024))
    assert spool.waiting() == ["3.png", "4.png"]
    assert spool.dropped == 3
    assert Spool(tmp_path / "s", fresh=True).waiting() == []


@pytest.mark.parametrize("all_sent", [True, False])
def test_the_folder_is_there_as_long_as_something_waits(tmp_path: Path, all_sent: bool) -> None:
    spool = Spool(tmp_path / "s", fresh=True)
    assert spool.folder.is_dir(), "also where no picture was drawn"
    spool.add("figures/b.png", text("b"))
    spool.close(all_sent=True)
    assert spool.waiting() == ["figures/b.png"]
    spool.send("figures/b.png", lambda file: None)
    spool.close(all_sent=all_sent)
    assert spool.folder.exists() is not all_sent, "calls that MLflow did not get wait elsewhere"
