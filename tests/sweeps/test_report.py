"""The report as a page, Markdown and JSON, from sweep folders on disk."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dvpo_service.errors import DataError
from dvpo_service.tracking.store import open_store
from tests.sweeps.synthetic import random_sweep, save_grid, save_trial
from tune_sweeps.grid import GRIDS, Arm, Grid
from tune_sweeps.records import Sweep, read_sweep, save_sweep
from tune_sweeps.report import write_report
from tune_sweeps.sections import repeat_command


class Page(HTMLParser):
    """The tags, links, ids and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "data")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_whole_sweep(tmp_path: Path) -> None:
    random_sweep(tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    html = path.read_text(encoding="utf-8")
    report = Page(html)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for arm in GRIDS["leave-one-out"].arms:
        assert arm.name in report.text
        assert f"| {arm.name}" in markdown
    for term in ("risk", "cvar", "gain", "shift", "shape", "curv", "consist"):
        assert f"critic/loss/{term}" in report.text
    for words in ("jagged quantiles", "a collapse of generalization", "Student's t", "? the seeds cannot tell"):
        assert words in report.text
        assert words in markdown
    assert "▼ lower" in markdown
    assert html.count("<svg") == 1 + 6 + 1 + 2  # differences, the guide's strips (risk is not tested), losses, curves


def test_the_page_stands_alone(tmp_path: Path) -> None:
    random_sweep(tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    report = Page(html)
    assert all(link.startswith("#") for link in report.links)
    assert {link[1:] for link in report.links} <= set(report.ids)
    assert len(report.ids) == len(set(report.ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(report.tags)
    assert not re.findall(r"url\((?!#)|@import", html)
    # The only URLs are the names of the SVG namespaces.
    assert set(re.findall(r'https?://[^"\s<]+', html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_odd_names_are_escaped(tmp_path: Path) -> None:
    odd = '<script>alert("$x_1$")</script> & |pipe|'.replace("/", "∕")
    grid = Grid("odd", "A <b>title</b>", (Arm("base", {}), Arm(odd, {"a.b": "<i>"})), reference="base")
    save_grid(tmp_path, grid, (0,))
    for arm in grid.arms:
        save_trial(tmp_path, arm.name, 0, after={"<split>": 0.5}, rows=[{"step": 0, "eval/<split>/accuracy": 0.5}])
    report = page(tmp_path)
    assert not {"script", "b>title", "i", "split"} & set(report.tags)
    assert odd in report.text
    row = next(x for x in (tmp_path / "report.md").read_text().splitlines() if "script" in x and x.startswith("|"))
    assert "<script" not in row
    assert "\\|pipe\\|" in row


def test_failed_unfinished_and_missing_trials_are_listed(tmp_path: Path) -> None:
    save_grid(tmp_path, "forms", (0, 1))
    save_trial(tmp_path, "form=paper", 0, after={"id": 0.5, "ood": 0.4}, before={"id": 0.4, "ood": None})
    save_trial(tmp_path, "form=paper", 1, status="failed", attempts=3, error="CUDA out of memory <now>\nline 2")
    rows = [{"step": 0, "eval/id/accuracy": 0.4, "eval/ood/accuracy": None}, {"step": 1, "critic/loss/qr": None}]
    save_trial(tmp_path, "form=calibrated", 0, status="running", rows=rows)
    text = page(tmp_path).text
    assert "CUDA out of memory <now>\nline 2" in text
    assert "1 of 6 trials failed" in text
    assert "4 of 6 trials are still to finish" in text
    assert "not begun" in text
    assert "running" in text
    assert "    line 2" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_every_grid_with_one_seed(tmp_path: Path, grid: str) -> None:
    random_sweep(tmp_path, grid, seeds=(3,), splits=("val",), critic=grid != "estimators", steps=6)
    text = page(tmp_path).text
    assert all(arm.name in text for arm in GRIDS[grid].arms)
    assert "cannot tell for any arm" in text


def test_no_reference(tmp_path: Path) -> None:
    random_sweep(tmp_path, replace(GRIDS["quantiles"], reference=None), seeds=(0, 1), steps=6)
    text = page(tmp_path).text
    assert "no reference arm" in text
    assert "n_quantiles=500" in text
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] == []


def test_a_searched_space(tmp_path: Path) -> None:
    """The arms of a searched space are known from its trials only."""
    grid = Grid("lr", "Learning rates", space={"policy.optim.lr": {"loguniform": [1e-5, 1e-3]}}, num_samples=2)
    save_grid(tmp_path, grid, (0,))
    for i in range(2):
        save_trial(tmp_path, f"draw-{i}", 0, after={"val": 0.5 + i / 10}, overrides={"policy.optim.lr": 1e-4 * (1 + i)})
    text = page(tmp_path).text
    assert "draw-1 with 60.0" in text
    assert "policy.optim.lr=0.0002" in text
    assert "not begun" not in text


def test_numbers(tmp_path: Path) -> None:
    random_sweep(tmp_path, steps=12)
    write_report(tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert numbers["reference"] == "full"
    assert len(numbers["accuracy"]) == 16
    # The guide adds five: risk has no noise, and gain is counted already.
    assert numbers["comparisons_with_interval"] == 16 + 5
    assert numbers["directions_expected_by_chance"] == pytest.approx(21 / 20)
    assert len(numbers["trials"]) == 27
    assert len(numbers["conclusion"]) == 2


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sweep\.json"):
        write_report(tmp_path)
    save_grid(tmp_path, "forms")
    save_trial(tmp_path, "form=paper", 0, status="waiting")
    with pytest.raises(DataError, match="no trial has measured anything yet") as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_only_a_failure_is_something_to_report(tmp_path: Path) -> None:
    save_grid(tmp_path, "leave-one-out")
    save_trial(tmp_path, "full", 0, status="failed", error="boom")
    assert "boom" in page(tmp_path).text


def test_command_to_repeat_it(tmp_path: Path) -> None:
    sweep = save_grid(tmp_path, "forms", (0, 1), overrides=["data.train_files=[a b.jsonl]"])
    assert repeat_command(sweep) == "dvpo sweep --config demo --grid forms --seeds 2 'data.train_files=[a b.jsonl]'"


def with_run(sweep: Sweep, uri: str, run_id: str) -> None:
    save_sweep(replace(sweep, mlflow_uri=uri, mlflow_run_id=run_id))


def test_artifacts_of_the_parent_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_store(uri)
    experiment = client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    with_run(random_sweep(tmp_path / "sweep", "forms", seeds=(0,), steps=6), uri, run)
    write_report(tmp_path / "sweep")
    assert {a.path for a in client.list_artifacts(run)} == {"report.html", "report.json", "report.md"}


@pytest.mark.parametrize("uri", ["sqlite:///{}/gone/mlflow.db", "http://user:secret@127.0.0.1:9"])
def test_mlflow_out_of_reach_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, uri: str) -> None:
    with_run(random_sweep(tmp_path, "forms", seeds=(0,), steps=6), uri.format(tmp_path), "0" * 32)
    with caplog.at_level(logging.WARNING):
        assert write_report(tmp_path).is_file()
    assert "the report is not in MLflow" in caplog.text
    assert "secret" not in caplog.text
    assert not (tmp_path / "gone").exists()


def test_the_record_is_only_read(tmp_path: Path) -> None:
    random_sweep(tmp_path, "forms", seeds=(0,), steps=6)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write_report(tmp_path)
    write_report(tmp_path)
    assert all(p.read_bytes() == data for p, data in before.items())
    assert read_sweep(tmp_path).grid.name == "forms"
