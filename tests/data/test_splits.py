"""The data that a config names: files to evaluate on, or a share of the training rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from dvpo_service.commands.summary import plan_facts
from dvpo_service.config import DataConfig, RewardConfig
from dvpo_service.data.splits import check_sources, load_data
from dvpo_service.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(50)))
    return str(path)


def test_prompts_of_the_training_data_are_not_evaluated_on(file: str, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text(Path(file).read_text() + json.dumps({"prompt": "new", "answer": "1"}))
    data = load_data(DataConfig(train_files=[file], val_files={"val": [str(tmp_path / "val.jsonl")]}))
    assert [p.messages[0]["content"] for p in data.held_out["val"].prompts] == ["new"]


def test_a_fraction_is_held_out_and_the_same_every_time(file: str) -> None:
    config = DataConfig(train_files=[file], val_fraction=0.2)
    data = load_data(config)
    assert (len(data.train), len(data.held_out["held_out"])) == (40, 10)
    assert not data.train.keys() & data.held_out["held_out"].keys()
    assert load_data(config) == data


def test_one_of_both_is_needed(file: str) -> None:
    with pytest.raises(ValidationError, match="exactly one of val_files"):
        DataConfig(train_files=[file])
    with pytest.raises(ValidationError, match="exactly one of val_files"):
        DataConfig(train_files=[file], val_files={"val": [file]}, val_fraction=0.5)


def test_shipped_files_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_data(
        DataConfig(train_files=["shipped:demo-train.jsonl"], val_files={"ood": ["shipped:demo-ood.jsonl"]})
    )
    assert (len(data.train), len(data.held_out["ood"])) == (3000, 200)


def test_noise_of_a_source_that_no_prompt_has_is_one_line(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "data_source": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = load_data(DataConfig(train_files=[str(tmp_path / "rows.jsonl")], val_fraction=0.5)).train
    check_sources(RewardConfig.model_validate({"noise_by_source": {"a": {"kind": "flip", "p": 0.1}}}), train)
    with pytest.raises(ConfigError, match=r"reward\.noise_by_source\.c: no training prompt .*; the data has a, b"):
        check_sources(RewardConfig.model_validate({"noise_by_source": {"c": {}}}), train)


def test_a_limit_and_repeated_rows_of_a_held_out_share_are_kept_and_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 40}+1=", "answer": str(i % 40 + 1)} for i in range(50)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + "not json\n")
    config = DataConfig(train_files=[str(tmp_path / "rows.jsonl")], val_fraction=0.4, on_bad_row="skip")
    held_out = load_data(config).held_out["held_out"]
    repeated = 20 - len(held_out)
    assert repeated > 0
    facts = plan_facts("model", load_data(config), tmp_path, None)
    assert facts["left_out"] == f"train: 1 bad rows skipped; held_out: {repeated} also in the training data"
    limited = load_data(config.model_copy(update={"val_limit": 3})).held_out["held_out"]
    assert (len(limited), limited.prompts) == (3, held_out.prompts[:3])


def test_a_validation_file_with_training_rows_is_told(file: str, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text(Path(file).read_text() + json.dumps({"prompt": "new", "answer": "1"}))
    data = load_data(DataConfig(train_files=[file], val_files={"val": [str(tmp_path / "val.jsonl")]}))
    assert data.held_out["val"].left_out == "50 also in the training data"
    assert data.train.left_out == ""
