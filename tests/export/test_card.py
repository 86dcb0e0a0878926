"""The model card states what the run did, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo_service.config import Config, load_config
from dvpo_service.export.export import export
from dvpo_service.export.model_card import model_card
from tests.builders import make_config

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_accuracy_before_and_at_the_step_exported(trained: Path, tmp_path: Path) -> None:
    """The card ignores the step without an evaluation and the evaluation after the checkpoint."""
    card = (export(trained, tmp_path / "out").folder / "README.md").read_text()
    assert "Before training, and after 2 updates." in card
    assert "| val | 25.0% | 75.0% | 50.0% | - |" in card
    assert "99.0%" not in card
    assert "3 heads x 20 quantiles" in card


def test_front_matter_for_the_hub(config: Config) -> None:
    card = model_card(config, 1, [], critic=True)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "dvpo-service", "dvpo"],
    }
    named = make_config("Qwen/Qwen2.5-0.5B-Instruct", algorithm={"adv_estimator": "grpo"})
    card = model_card(named, 1, [], critic=False)
    assert front_matter(card)["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert "DistributionalCritic" not in card
    assert "critic" not in card


@pytest.mark.parametrize("path", ["/data/models/mine", "./mine", "../a/b", "mine/of/many"])
def test_a_folder_is_no_name_on_the_hub(path: str) -> None:
    card = model_card(make_config(path), 1, [], critic=True)
    assert "base_model" not in card
    assert path not in card


def test_the_demos_card_says_how_its_sums_are_written() -> None:
    demo = load_config("demo")
    assert "Sums are written from the last digit on: 29 is 92." in model_card(demo, 1, [], critic=True)
    assert "last digit" not in model_card(make_config("a/b"), 1, [], critic=True)


def test_training_files_are_named_without_their_folders(config: Config) -> None:
    data = config.data.model_copy(update={"train_files": ["/secret/place/rows.jsonl", "shipped:demo-train.jsonl"]})
    card = model_card(config.model_copy(update={"data": data}), 1, [], critic=True)
    assert "| training data | rows.jsonl, demo-train.jsonl |" in card


def test_the_code_in_card_and_guide_runs(trained: Path, tmp_path: Path) -> None:
    folder = export(trained, tmp_path / "demo-policy").folder
    guide = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    card_code = PYTHON.findall((folder / "README.md").read_text())
    guide_code = PYTHON.findall(guide)
    assert (len(card_code), len(guide_code)) == (2, 1)
    code = "\n".join([*card_code, "import os", "os.chdir('..')", *guide_code, "print('spread', disagreement.shape)"])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in ("mean tensor(", "CVaR tensor(", "spread torch.Size"):
        assert text in done.stdout
