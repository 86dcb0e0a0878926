"""A file over the config that it extends, and overrides over both: what replaces, what clears, what follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvpo_service.config import Config, load_config, to_yaml
from dvpo_service.errors import ConfigError


@pytest.fixture
def child(tmp_path: Path):
    def load(text: str, *overrides: str, extends: str = "demo") -> Config:
        (tmp_path / "child.yaml").write_text(f"extends: {extends}\n{text}\n")
        return load_config(str(tmp_path / "child.yaml"), overrides)

    return load


def test_one_side_of_an_either_or_clears_the_other_in_a_file(child) -> None:
    config = child("model: {path: some/model}\ndata: {val_fraction: 0.1}")
    assert (config.model.path, config.model.warmstart) == ("some/model", None)
    assert (config.data.val_fraction, config.data.val_files) == (0.1, {})
    assert config.data.max_prompt_tokens == 16, "the rest of the section stays"


def test_one_side_of_an_either_or_clears_the_other_in_an_override() -> None:
    config = load_config("demo", ["model.path=some/model", "data.val_fraction=0.1"])
    assert (config.model.path, config.model.warmstart) == ("some/model", None)
    assert (config.data.val_fraction, config.data.val_files) == (0.1, {})


def test_and_back_again(child, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\nmodel: {path: some/model}\ndata: {val_fraction: 0.1}\n")
    text = "model: {warmstart: {steps: 5}}\ndata: {val_files: mine.jsonl}"
    config = child(text, extends="base.yaml")
    assert config.model.path is None
    assert (config.model.warmstart.steps, config.data.val_files) == (5, {"mine": ["mine.jsonl"]})
    config = child("", "model.warmstart={steps: 5}", "data.val_files=mine.jsonl", extends="base.yaml")
    assert (config.model.path, config.data.val_fraction) == (None, None)


def test_a_run_s_own_config_can_be_changed_likewise(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("demo")))
    config = load_config(str(tmp_path / "config.yaml"), ["model.path=some/model", "data.val_fraction=0.1"])
    assert (config.model.warmstart, config.data.val_files) == (None, {})


@pytest.mark.parametrize(
    "both",
    [
        "model: {path: a, warmstart: {steps: 5}}",
        "data: {val_fraction: 0.1, val_files: b.jsonl}",
    ],
)
def test_both_sides_in_one_layer_are_refused(child, both: str) -> None:
    with pytest.raises(ConfigError, match=r"give exactly one of .*null clears the other"):
        child(both)


def test_both_sides_in_the_overrides_are_refused_in_either_order() -> None:
    pair = ["data.val_fraction=0.1", "data.val_files=b.jsonl"]
    for overrides in (pair, pair[::-1]):
        with pytest.raises(ConfigError, match="give exactly one of"):
            load_config("demo", overrides)


def test_a_key_of_a_section_that_is_not_there_clears_nothing() -> None:
    with pytest.raises(ConfigError, match="give exactly one of path"):
        load_config("qwen2.5-7b-fsdp", ["model.warmstart.steps=5"])


@pytest.mark.parametrize("nothing", ["null", "{}", "", "~"])
def test_null_or_an_empty_mapping_clears_a_mapping_of_own_keys(child, tmp_path: Path, nothing: str) -> None:
    (tmp_path / "base.yaml").write_text(
        "extends: demo\ntracking: {tags: {a: b}}\nreward: {noise_by_source: {demo: {kind: flip, p: 0.1}}}\n"
    )
    text = (
        f"tracking: {{tags: {nothing}}}\nreward: {{noise_by_source: {nothing}}}\n"
        f"data: {{val_files: {nothing}, val_fraction: 0.2}}"
    )
    config = child(text, extends="base.yaml")
    assert (config.tracking.tags, config.reward.noise_by_source, config.data.val_files) == ({}, {}, {})
    config = load_config(str(tmp_path / "base.yaml"), [f"tracking.tags={nothing}", f"reward.noise_by_source={nothing}"])
    assert (config.tracking.tags, config.reward.noise_by_source) == ({}, {})


def test_a_mapping_of_own_keys_replaces_the_inherited_one(child) -> None:
    assert child("data: {val_files: {mine: mine.jsonl}}").data.val_files == {"mine": ["mine.jsonl"]}
    added = load_config("demo", ["data.val_files.mine=mine.jsonl"]).data.val_files
    assert set(added) == {"id", "ood", "mine"}, "an override of one key adds it"


def test_a_section_left_empty_changes_nothing(child) -> None:
    assert child("rollout: {}").rollout == load_config("demo").rollout
    with pytest.raises(ConfigError, match="rollout: "):
        child("rollout:")


def test_clearing_without_the_other_side_says_what_is_missing(child) -> None:
    with pytest.raises(ConfigError, match="give exactly one of val_files"):
        child("data: {val_files: null}")


@pytest.mark.parametrize("name", ["demo", "demo-grpo"])
def test_defaults_follow_their_key_also_over_a_run_s_own_config(tmp_path: Path, name: str) -> None:
    """A resolved config gives every key, so that a form or estimator over it changed nothing but its name."""
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(name)))
    changes = ["algorithm.form=paper", "algorithm.adv_estimator=dvpo", "policy.kl.where=reward", "policy.kl.coef=0.1"]
    again = load_config(str(tmp_path / "config.yaml"), changes)
    assert again == load_config(name, changes)
    assert (again.algorithm.huber_delta, again.algorithm.dvpo_loss_weights.consist) == (1.0, 1.0)
    assert (again.algorithm.whiten_advantages, again.policy.kl.kind) == (True, "k1")


def test_what_was_chosen_does_not_follow(tmp_path: Path) -> None:
    chosen = ["algorithm.huber_delta=0.3", "algorithm.dvpo_loss_weights.cvar=2", "algorithm.curvature=pointwise"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("demo", chosen)))
    again = load_config(str(tmp_path / "config.yaml"), ["algorithm.form=paper", "algorithm.tail_target=pseudo_outcome"])
    assert (again.algorithm.huber_delta, again.algorithm.dvpo_loss_weights.cvar) == (0.3, 2.0)
    assert again.algorithm.tail_target == "pseudo_outcome", "given in the same layer"
    assert (
        again.algorithm.dvpo_loss_weights.gain
        == load_config("demo", ["algorithm.form=paper"]).algorithm.dvpo_loss_weights.gain
    )


def test_the_loss_that_takes_no_dual_clip_can_be_set_over_one(child, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\npolicy: {dual_clip: 3}\n")
    with pytest.raises(ConfigError, match="set dual_clip=null"):
        child("policy: {loss: gspo}", extends="base.yaml")
    assert child("policy: {loss: gspo, dual_clip: null}", extends="base.yaml").policy.loss == "gspo"
