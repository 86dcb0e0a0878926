"""``dvpo eval`` without engines: which model and prompts it takes, what it prints and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import dvpo_service.commands.evaluate
from dvpo_service.commands.evaluate import Subject, evaluate, from_run
from dvpo_service.config import Config
from dvpo_service.data.dataset import Dataset
from dvpo_service.eval_stats import PromptScores
from dvpo_service.export.export import export
from dvpo_service.export.states import config_of
from dvpo_service.models.load import load_causal_lm
from dvpo_service.terminal.progress import Bar


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the engines by scores in which every second sample is right."""

    def launched(config: Config, model: str, data: Mapping[str, Dataset], n: int, bar: Bar) -> list[PromptScores]:
        bar.update(sum(map(len, data.values())))
        outcomes = tuple(float(i % 2) for i in range(n))
        return [PromptScores(split, p.source, outcomes, 1.0) for split, d in data.items() for p in d.prompts]

    monkeypatch.setattr(dvpo_service.commands.evaluate, "measure", launched)


def test_a_checkpoint_is_a_model_for_as_long_as_it_is_evaluated(run: Path) -> None:
    with from_run(run, "a run", config_of(run, ["rollout.temperature=0.5"])) as subject:
        assert (subject.step, subject.name) == (3, "a run")
        assert subject.config.rollout.temperature == 0.5
        load_causal_lm(subject.model)
    assert not Path(subject.model).exists()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000003"]


def test_an_export_is_evaluated_where_it_is(run: Path) -> None:
    policy = export(run, run / "policy").folder
    with from_run(run, str(run), config_of(run)) as subject:
        assert subject.model == str(policy)


@pytest.mark.usefixtures("scored")
def test_tables_and_json(config: Config, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "eval.json"
    evaluate(Subject(config, str(tiny_model), "tiny", 3), [], 4, output)
    results = json.loads(output.read_text())
    assert (results["model"], results["step"], results["n"]) == ("tiny", 3, 4)
    assert results["splits"]["val"]["accuracy"] == 0.5
    assert results["splits"]["val"]["pass_at_k"] == {"1": 0.5, "2": pytest.approx(5 / 6), "4": 1.0}
    shown = capsys.readouterr().out
    assert "tiny after 3 updates: 4 samples a prompt at temperature 1" in shown
    assert "pass@4" in shown
    assert "evaluating tiny" in shown, "progress, a line at least"


@pytest.mark.usefixtures("scored")
def test_files_take_the_place_of_the_splits(
    config: Config, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1+1=", "answer": "2", "data_source": name} for name in ("sums", "sums", "other")]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [str(tmp_path / "mine.jsonl"), "shipped:demo-ood.jsonl"]
    results = evaluate(Subject(config, str(tiny_model), "tiny"), files, 2, None)
    assert results["splits"].keys() == {"mine", "demo-ood"}
    assert results["sources"]["sums"]["prompts"] == 2
    assert "source" in capsys.readouterr().out
