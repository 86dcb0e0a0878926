"""`dvpo train` with everything in one process: a run, its continuation, other estimators, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import load_file

from dvpo_service.commands.evaluate import evaluate, from_run
from dvpo_service.commands.train import train
from dvpo_service.config import Config
from dvpo_service.errors import CheckpointError, ConfigError
from dvpo_service.export.export import export, open_export
from tests.builders import make_config


def in_process(model: Path, /, **sections: dict[str, Any]) -> Config:
    tree = {
        "cluster": {"in_process": True},
        "data": {"max_prompt_tokens": 16, "val_limit": 8},
        "trainer": {"num_steps": 4, "eval_every": 2, "save_every": 2},
        "tracking": {"mlflow": False},
    }
    return make_config(model, **{k: tree.get(k, {}) | sections.get(k, {}) for k in tree | sections})


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[dict[str, Any]]:
    """Return all metrics but times and speeds."""
    return [{k: v for k, v in r.items() if not k.startswith("time") and not k.endswith("_per_s")} for r in rows(run)]


def test_a_run_that_is_continued_equals_one_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    summary = train(in_process(tiny_model), tmp_path / "whole")
    assert not ray.is_initialized()
    assert not dist.is_initialized(), "another run can follow in this process"
    assert summary["steps"] == 4
    for steps in (2, 4):
        # The schedule is constant, so the first half does not depend on the number of steps.
        train(in_process(tiny_model, trainer={"num_steps": steps}), tmp_path / "cut")
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
    assert [r["step"] for r in rows(tmp_path / "whole")] == list(range(5))
    assert all(r["policy/rollout_kl"] < 1e-8 for r in rows(tmp_path / "whole")[1:])
    exports = [open_export(tmp_path / name / "policy").folder for name in ("whole", "cut")]
    for file in ("model.safetensors", "critic/model.safetensors"):
        one, two = (load_file(folder / file) for folder in exports)
        assert all(one[k].equal(two[k]) for k in one)


def test_an_evaluation_gives_what_the_run_measured(tiny_model: Path, tmp_path: Path) -> None:
    config = in_process(tiny_model, trainer={"num_steps": 1, "eval_samples": 2})
    train(config, tmp_path / "run")
    with from_run(tmp_path / "run", "it", config) as subject:
        found = evaluate(subject, [], 2, None)
    assert not ray.is_initialized()
    last = rows(tmp_path / "run")[-1]
    assert found["step"] == 1
    assert found["splits"]["val"]["accuracy"] == last["eval/val/accuracy"]
    assert found["splits"]["val"]["greedy"] == last["eval/val/greedy"]


def test_grpo_with_a_reference_dynamic_sampling_and_checkpointing(tiny_model: Path, tmp_path: Path) -> None:
    config = in_process(
        tiny_model,
        algorithm={"adv_estimator": "grpo"},
        rollout={"dynamic_sampling": True},
        policy={"kl": {"coef": 0.01}, "gradient_checkpointing": True},
        trainer={"num_steps": 2},
    )
    train(config, tmp_path / "run")
    last = rows(tmp_path / "run")[-1]
    assert last["step"] == 2
    assert last["policy/ref_kl"] >= 0
    assert not any(name.startswith("critic/") for name in last)
    assert open_export(tmp_path / "run" / "policy").critic is None


def test_adapters_of_policy_and_critic_are_trained_saved_continued_and_exported(
    tiny_model: Path, tmp_path: Path
) -> None:
    lora = {"lora": {"rank": 4}, "optim": {"lr": 1e-2}}
    sections: Any = {
        "policy": lora | {"kl": {"coef": 0.01}, "mini_batch_size": 16},  # one optimizer step an update
        "critic": lora,
        # Responses of an untrained model are all wrong: noise gives the policy something to learn.
        "reward": {"noise": {"kind": "gaussian", "sd": 1.0}},
    }
    train(in_process(tiny_model, **sections), tmp_path / "whole")
    for steps in (2, 4):
        train(in_process(tiny_model, **sections, trainer={"num_steps": steps}), tmp_path / "cut")
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")
    first, *_, last = rows(tmp_path / "whole")[1:]
    assert first["policy/ref_kl"] == 0, "at first an adapter changes nothing: the policy is its reference"
    assert last["policy/ref_kl"] > 1e-4
    assert last["policy/rollout_kl"] < 1e-8

    exported = open_export(tmp_path / "whole" / "policy").folder
    by_hand = export(tmp_path / "cut" / "checkpoints" / "step-000004", tmp_path / "by-hand").folder
    base = load_file(tiny_model / "model.safetensors")
    for file in ("model.safetensors", "critic/model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = load_file(exported / file), load_file(by_hand / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one), file
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == base.keys()
    changed = {k for k in base if not torch.equal(base[k], weights[k])}
    assert changed == {k for k in base if "proj.weight" in k}, "what has no adapter is the base model's"
    saved = [f for f in (tmp_path / "cut/checkpoints/step-000004/policy").iterdir() if f.suffix == ".safetensors"]
    assert not any("embed" in name or "base_layer" in name for f in saved for name in load_file(f))


def test_an_adapter_of_other_settings_is_another_run(tiny_model: Path, tmp_path: Path) -> None:
    one = {"policy": {"lora": {"rank": 4}}, "trainer": {"num_steps": 1}}
    train(in_process(tiny_model, **one), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"policy\.lora was .*rank.:4"):
        train(in_process(tiny_model, policy={"lora": {"rank": 8}}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"critic\.lora\.target_modules=\['query'\]"):
        train(in_process(tiny_model, critic={"lora": {"target_modules": ["query"]}}), tmp_path / "other")
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").glob("metrics*"))


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("policy", {"world_size": 2}, "policy.world_size"),
        ("critic", {"world_size": 2}, "critic.world_size"),
        ("rollout", {"num_engines": 2}, "rollout.num_engines"),
        ("rollout", {"max_staleness": 1}, "rollout.max_staleness"),
        ("model", {"dtype": "bfloat16"}, "model.dtype"),
    ],
)
def test_what_one_process_cannot_do_is_refused(tiny_model: Path, section: str, values: Any, key: str) -> None:
    with pytest.raises(ValidationError, match=rf"in one process: {key} must be"):
        in_process(tiny_model, **{section: values})
