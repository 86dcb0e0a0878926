"""What is typed is what a run gets: text stays text, numbers are numbers, and nothing is dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dvpo_service.config import load_config, to_yaml
from dvpo_service.errors import ConfigError
from tune_sweeps.plan import find_grid, resolve

TEXTS = [
    *("12e4567", "4512367", "007", "1e5", "on", "off", "yes", "No", "0x10", "1_000", "2024-11-27", "1:30", "true"),
    *("a: b", "*x", "&y", "@z", "run #3", "1.50", ".5", "+1", "-", "%", "!x", "| y", "ü: 漢", "nan", "=", "<<"),
]


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: some/model}\ndata: {train_files: a.jsonl, val_files: {val: b.jsonl}}\n")
    return str(file)


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_is_kept_as_typed(path: str, text: str, tmp_path: Path) -> None:
    keys = ("tracking.run_name", "tracking.tags.commit", "model.path", "data.train_files", "name")
    config = load_config(path, [f"{key}={text}" for key in keys])
    assert (config.tracking.run_name, config.tracking.tags["commit"], config.name) == (text, text, text)
    assert (config.model.path, config.data.train_files) == (text, [text])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("text", ["12e4567", "4512367", "007", "1e5", "on", "0x10", "1_000", "2024-11-27", "true"])
def test_a_plain_scalar_in_a_file_or_in_brackets_is_text_where_text_is_wanted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"extends: demo\ntracking: {{run_name: {text}, tags: {{{text}: {text}}}}}\n"
        f"data: {{train_files: [{text}, b], val_files: {{{text}: {text}}}}}\n"
    )
    config = load_config(str(file), [f"serve.model_name={text}", f"cluster.address='{text}'"])
    assert (config.tracking.run_name, config.tracking.tags) == (text, {text: text})
    assert (config.data.train_files, config.data.val_files) == ([text, "b"], {text: [text]})
    assert (config.serve.model_name, config.cluster.address) == (text, text)
    config = load_config("demo", [f"tracking.tags={{commit: {text}}}", f"data.train_files=[{text}]"])
    assert (config.tracking.tags, config.data.train_files) == ({"commit": text}, [text])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("policy.optim.lr=1e-3", "policy.optim.lr", 1e-3),
        ("trainer.seed=010", "trainer.seed", 10),
        ("trainer.seed=0x10", "trainer.seed", 16),
        ("trainer.num_steps=1_000", "trainer.num_steps", 1000),
        ("trainer.num_steps=1e3", "trainer.num_steps", 1000),
        ("trainer.num_steps='12'", "trainer.num_steps", 12),
        ("tracking.mlflow=off", "tracking.mlflow", False),
        ("rollout.enforce_eager=yes", "rollout.enforce_eager", True),
        ("policy.optim.betas=[0.9, 1e-1]", "policy.optim.betas", (0.9, 0.1)),
        ("tracking.run_name=null", "tracking.run_name", None),
        ("tracking.run_name='null'", "tracking.run_name", "null"),
        ("tracking.run_name=", "tracking.run_name", None),
        ("tracking.run_name='run #3'", "tracking.run_name", "run #3"),
    ],
)
def test_numbers_switches_and_null(override: str, key: str, value: object) -> None:
    config: Any = load_config("demo", [override])
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize("override", ["trainer.seed=1:30", "trainer.seed=2024-11-27", "policy.optim.lr=on"])
def test_what_yaml_1_1_takes_for_a_number_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="should be a valid"):
        load_config("demo", [override])


def test_a_comment_inside_brackets_is_told(path: str) -> None:
    with pytest.raises(ConfigError, match=r"YAML reads ' #' as the start of a comment: put quotes"):
        load_config(path, ["data.train_files=[a #3.jsonl, b.jsonl]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: demo\ntrainer: {seed: 1}\npolicy: {}\ntrainer: {num_steps: 2}\n", r":4: 'trainer' .* in line 2"),
        ("extends: demo\ntrainer:\n  seed: 1\n  num_steps: 3\n  'seed': 2\n", r":5: 'seed' is given twice, .* line 3"),
        ("extends: demo\ntracking: {tags: {1: a, '1': b}}\n", r":2: '1' is given twice, first in line 2"),
        ("extends: demo\n? [a]\n: 1\n", r":2: a key must be text"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_places(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    (tmp_path / "above.yaml").write_text("extends: twice.yaml\n")
    for name in ("twice", "above"):
        with pytest.raises(ConfigError, match=r"twice\.yaml" + message):
            load_config(str(tmp_path / f"{name}.yaml"))


def test_a_key_given_twice_in_an_override_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"override 'tracking.*'a' is given twice"):
        load_config("demo", ["tracking.tags={a: 1, a: 2}"])


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "extends: demo\ncritic: {optim: &o {lr: 1e-3, eps: 1e-7}}\npolicy: {optim: {<<: *o, lr: 2e-3}}\n"
    )
    config = load_config(str(tmp_path / "a.yaml"))
    assert (config.policy.optim.lr, config.policy.optim.eps) == (2e-3, 1e-7)


def test_a_node_that_holds_itself_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: &m {path: *m}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:1: an alias stands for what holds it"):
        load_config(str(tmp_path / "a.yaml"))


def test_the_arms_of_a_grid_keep_their_text_too(tmp_path: Path) -> None:
    grid = tmp_path / "commits.yaml"
    grid.write_text(
        "arms:\n  007: {tracking.run_name: 12e4567, tracking.tags: {c: 0010}, trainer.num_steps: 3}\n  b: {}\n"
    )
    arm, _ = find_grid(str(grid)).arms
    config = resolve("demo", [], arm.overrides, 0)
    assert (arm.name, config.tracking.run_name, config.tracking.tags) == ("007", "12e4567", {"c": "0010"})
    assert config.trainer.num_steps == 3
    grid.write_text("arms:\n  a: {trainer.num_steps: 3}\n  a: {trainer.num_steps: 4}\n")
    with pytest.raises(ConfigError, match=r"commits\.yaml:3: 'a' is given twice, first in line 2"):
        find_grid(str(grid))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12))
def test_any_line_of_text_is_kept(path: str, text: str) -> None:
    if text.strip()[:1] in ("'", '"', "[", "{", "") or text.strip() in ("~", "null"):
        return
    assert load_config(path, [f"tracking.run_name={text}"]).tracking.run_name == text.strip()
