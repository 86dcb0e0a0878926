"""A run continues only as the run that it was: the same model, data, critic and reward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dvpo_service.commands.identity import VALIDATION
from dvpo_service.commands.resume import resume_point
from dvpo_service.config import Config, load_config
from dvpo_service.data.splits import load_data
from dvpo_service.errors import CheckpointError
from dvpo_service.runs.checkpoint import Checkpoint, Checkpoints


class Run:
    """A run directory with a checkpoint, and copies of the model and the data that the run started from."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        self.model = Path(shutil.copytree(model, folder / "model"))
        self.train = self._rows("train", range(5))
        self.val = self._rows("val", range(5, 8))
        self.checkpoints = Checkpoints(folder / "run", keep=2)
        self.resume()
        self.checkpoints.begin(3, {}, {"state": {"step": 3}})
        self.checkpoints.finish()

    def _rows(self, name: str, numbers: range) -> Path:
        file = self.folder / f"{name}.jsonl"
        file.write_text(
            "".join(json.dumps({"prompt": f"{n} + 1 =", "answer": str(n + 1), "level": n}) + "\n" for n in numbers)
        )
        return file

    def config(self, *overrides: str) -> Config:
        return load_config(
            "demo",
            [
                "model.warmstart=null",
                f"model.path={self.model}",
                f"data.train_files={self.train}",
                f"data.val_files={{val: [{self.val}]}}",
                *overrides,
            ],
        )

    def resume(self, *overrides: str) -> Checkpoint | None:
        config = self.config(*overrides)
        return resume_point(config, load_data(config.data), self.checkpoints)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    return Run(tmp_path, tiny_model)


def replaced(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


def other_weights(run: Run) -> None:
    file = next(run.model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


CHANGES: dict[str, Callable[[Run], None]] = {
    "model.path names": other_weights,
    r"model.path \(tokenizer\) names": lambda run: replaced(run.model / "tokenizer_config.json", b"{", b"{ "),
    "data.train_files names": lambda run: replaced(run.train, b'"answer": "3"', b'"answer": "4"'),
    r"data.train_files \(columns\) names": lambda run: replaced(run.train, b'"level": 3', b'"level": 4'),
    VALIDATION + r"val \(columns\) names": lambda run: replaced(run.val, b'"level": 6', b'"level": 7'),
    VALIDATION + "val names": lambda run: replaced(run.val, b"6 + 1", b"9 + 1"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_other_content_under_the_same_name_is_another_run(run: Run, key: str) -> None:
    CHANGES[key](run)
    with pytest.raises(CheckpointError, match=rf"step-000003 is of another run: {key} other content now\. Give what"):
        run.resume()
    assert run.resume("trainer.resume=never") is None


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator was dvpo and is grpo now"),
        ("algorithm.n_quantiles=7", r"algorithm.n_quantiles was \d+ and is 7 now"),
        ("reward.function=math", "reward.function was exact_match and is math now"),
    ],
)
def test_another_setting_is_named_with_both_values(run: Run, override: str, difference: str) -> None:
    with pytest.raises(CheckpointError, match=difference):
        run.resume(override)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "spiece.model", "vocab.txt"])
def test_every_file_of_the_tokenizer_counts(run: Run, name: str) -> None:
    (run.model / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.path \(tokenizer\) names other content now"):
        run.resume()


def test_other_files_in_the_model_folder_do_not_count(run: Run) -> None:
    (run.model / "README.md").write_text("words")
    (run.model / "tokenizer_tests").mkdir()
    assert run.resume()


def test_what_may_change_may_change(run: Run) -> None:
    assert run.resume("critic.optim.lr=1e-3", "trainer.num_steps=400", "reward.timeout_s=3")
    assert run.resume(f"data.val_files={{other: [{run.val}]}}"), "another split in place of the old one"
    assert run.resume(f"data.val_files={{val: [{run.val}], more: [{run.val}]}}"), "one more split"
    run.model = run.model.rename(run.folder / "moved")
    run.train = run.train.rename(run.folder / "renamed.jsonl")
    assert run.resume()


def test_a_checkpoint_of_a_version_without_identities_is_continued(run: Run) -> None:
    run.checkpoints.identity = {}
    run.checkpoints.begin(4, {}, {"state": {"step": 4}})
    run.checkpoints.finish()
    other_weights(run)
    found = run.resume()
    assert found is not None
    assert found.record["state"]["step"] == 4
