"""The configuration: shipped files, presets, overrides and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dvpo_service.config import load_config, shipped_configs, to_yaml
from dvpo_service.config.load import known_keys
from dvpo_service.errors import ConfigError
from dvpo_service.registry.estimators import ESTIMATORS


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: some/model}\ndata: {train_files: a.jsonl, val_files: {val: b.jsonl}}\n")
    return str(file)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_parse_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_the_issue_names_these_configs() -> None:
    assert {"demo", "gsm8k-calc", "gsm8k-question", "qwen2.5-7b-fsdp"} <= set(shipped_configs())


def test_overrides_are_typed_yaml(path: str) -> None:
    config = load_config(
        path,
        [
            "algorithm.dvpo_loss_weights.ablate_gain=true",
            "policy.optim.lr=1e-5",
            "data.train_files=[x.jsonl, y.jsonl]",
            "reward.noise={kind: flip, p: 0.3}",
            "trainer.run_dir=null",
        ],
    )
    assert config.algorithm.dvpo_loss_weights.effective()["gain"] == 0.0
    assert config.policy.optim.lr == 1e-5
    assert config.data.train_files == ["x.jsonl", "y.jsonl"]
    assert (config.reward.noise.kind, config.reward.noise.p) == ("flip", 0.3)


def test_a_form_is_a_preset_and_a_key_that_is_given_wins(path: str) -> None:
    default = load_config(path).algorithm
    assert (default.form, default.advantage, default.huber_scale) == ("robust", "huber", "return_width")
    paper, calibrated = (load_config(path, [f"algorithm.form={form}"]).algorithm for form in ("paper", "calibrated"))
    assert (paper.quantile_levels, paper.critic_target, paper.huber_unit) == ("endpoint", "gae", False)
    assert (calibrated.quantile_levels, calibrated.critic_target) == ("midpoint", "mixture")
    assert paper.dvpo_loss_weights.consist == 1.0
    assert calibrated.dvpo_loss_weights.consist == 0.01
    mixed = load_config(
        path, ["algorithm.form=calibrated", "algorithm.curvature=pointwise", "algorithm.dvpo_loss_weights.cvar=2"]
    ).algorithm
    assert (mixed.curvature, mixed.tail_target) == ("pointwise", "pseudo_outcome")
    assert (mixed.dvpo_loss_weights.cvar, mixed.dvpo_loss_weights.gain) == (2.0, 0.1)


def test_a_bare_validation_file_names_its_split(path: str) -> None:
    assert load_config(path, ["data.val_files=some/test.jsonl"]).data.val_files == {"test": ["some/test.jsonl"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.dvpo_alhpa=0.2", r"unknown key 'algorithm\.dvpo_alhpa'; did you mean 'algorithm\.dvpo_alpha'"),
        ("dvpo_alpha=0.2", r"unknown key 'dvpo_alpha'; did you mean 'algorithm\.dvpo_alpha'"),
        ("trainr.seed=3", r"unknown key 'trainr'; did you mean 'trainer'"),
        (
            "algorithm.dvpo_loss_weights.ablate_gian=true",
            r"ablate_gian'; did you mean 'algorithm\.dvpo_loss_weights\.ablate_gain'",
        ),
        ("rollout.n=0", r"rollout\.n: Input should be greater than 0 \(got 0\)"),
        ("policy.optim.lr=fast", r"policy\.optim\.lr: .*valid number.*\(got 'fast'\)"),
        ("policy.optim.lr=.inf", r"policy\.optim\.lr: .*finite"),
        ("algorithm.form=best", r"algorithm\.form: Input should be 'paper', 'calibrated' or 'robust' \(got 'best'\)$"),
        ("algorithm.dvpo_alpha=0", r"algorithm\.dvpo_alpha: .*more than 0 and at most 1.*ablate_cvar or .*got 0"),
        ("critic.world_size=3", r"critic: the batch of prompts_per_step x n = 256 .* world_size = 3 ranks"),
        ("model.warmstart={}", r"model: give exactly one of path .* and warmstart"),
        ("seed", r"override 'seed': write it as key\.sub=value"),
        ("trainer.seed=[", r"override 'trainer\.seed=\[': the value is not valid YAML"),
    ],
)
def test_a_mistake_gets_one_clear_line(path: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, [override])
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config 'dmeo'.*did you mean 'demo'"):
        load_config("dmeo")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"list\.yaml: a config is a mapping"):
        load_config(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_config(str(tmp_path / "broken.yaml"))


def test_recipe_keys_are_where_its_users_look() -> None:
    known = set(known_keys())
    for key in ("dvpo_alpha", "dvpo_beta", "n_quantiles", "n_heads", "critic_hidden_dim", "adv_estimator"):
        assert f"algorithm.{key}" in known
    for term in ("risk", "cvar", "gain", "shift", "shape", "curv", "consist"):
        assert f"algorithm.dvpo_loss_weights.{term}" in known
        assert f"algorithm.dvpo_loss_weights.ablate_{term}" in known


def test_the_dump_is_plain_yaml(path: str) -> None:
    assert yaml.safe_load(to_yaml(load_config(path)))["rollout"]["n"] == 8


def test_a_config_may_start_from_another_one(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {path: some/model}\ndata: {train_files: a.jsonl, val_files: {val: b.jsonl}}\nrollout: {n: 4}\n"
    )
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nrollout: {temperature: 0.5}\n")
    (tmp_path / "shipped.yaml").write_text("extends: demo\ntrainer: {num_steps: 7}\n")
    mine, shipped = load_config(str(tmp_path / "mine.yaml")), load_config(str(tmp_path / "shipped.yaml"))
    assert (mine.name, mine.rollout.n, mine.rollout.temperature) == ("mine", 4, 0.5)
    assert shipped == load_config("demo", ["name=shipped", "trainer.num_steps=7"])


def test_home_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("extends: demo\nmodel: {path: ~/model, warmstart: null}\n")
    assert load_config("~/mine.yaml").model.path == str(tmp_path / "model")


def test_a_circle_of_configs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"extends 'a\.yaml', which extends it again"):
        load_config(str(tmp_path / "a.yaml"))


def test_every_estimator_has_a_shipped_config() -> None:
    used = {load_config(name).algorithm.adv_estimator for name in shipped_configs()}
    assert used == set(ESTIMATORS)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algorithm.dvpo_alpha=0.6", "algorithm.dvpo_beta=0.5"], "the tails would overlap"),
        (["algorithm.n_quantiles=1", "algorithm.quantile_levels=endpoint"], "only rises"),
        (["algorithm.adv_estimator=grpo", "rollout.n=1"], "compares a prompt's samples: rollout.n must be 2"),
        (["algorithm.adv_estimator=rloo", "trainer.critic_warmup=5"], "rloo has no critic"),
        (["rollout.n=1", "rollout.dynamic_sampling=true"], "rollout.n must be 2 or more"),
        (["reward.overlong_buffer=99"], "must be shorter than rollout.max_new_tokens = 16"),
        (["policy.dual_clip=1"], "greater than 1"),
        (["algorithm.adv_estimator=ppo"], "use one of dvpo, gae"),
        (["policy.kl={coef: 0.1, kind: k1}"], "kind=k1 with where=loss does nothing"),
        (["policy.kl={coef: 0.1, kind: k3, where: reward}"], "kind=k3 with where=reward has another gradient"),
        (["trainer.seed=-1"], "greater than or equal to 0"),
        (["trainer.seed=9223372036854775808"], "less than or equal to 9223372036854775807"),
    ],
)
def test_combinations_that_mean_nothing_are_refused_with_the_reason(
    path: str, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert reason in str(error.value)


def test_one_head_and_one_quantile_are_a_critic(path: str) -> None:
    load_config(path, ["algorithm.n_heads=1", "algorithm.n_quantiles=1", "algorithm.form=calibrated"])


@pytest.mark.parametrize(
    ("overrides", "correction"),
    [
        ([], "none"),
        (["rollout.max_staleness=2"], "truncated"),
        (["rollout.max_staleness=2", "rollout.importance_correction=masked"], "masked"),
        (["rollout.max_staleness=2", "rollout.importance_correction=none"], "none"),
        (["rollout.importance_correction=truncated"], "truncated"),
    ],
)
def test_stale_tokens_are_weighed_unless_told_otherwise(path: str, overrides: list[str], correction: str) -> None:
    assert load_config(path, overrides).rollout.correction == correction


def test_the_kind_of_kl_follows_its_place() -> None:
    assert load_config("demo").policy.kl.kind == "k3"
    assert load_config("demo", ["policy.kl={coef: 0.1, where: reward}"]).policy.kl.kind == "k1"
    kept = load_config("demo", ["policy.kl={coef: 0, kind: k3, where: reward}"])
    assert kept.policy.kl.kind == "k3", "without effect, and in configs of earlier runs"


def test_a_micro_batch_holds_a_sequence(path: str) -> None:
    sizes = ["data.max_prompt_tokens=100", "rollout.max_new_tokens=28", "policy.max_tokens_per_micro_batch=127"]
    with pytest.raises(ConfigError, match=r"policy\.max_tokens_per_micro_batch = 127 .*max_new_tokens = 128"):
        load_config(path, sizes)
    load_config(path, [*sizes, "policy.max_tokens_per_micro_batch=128"])
