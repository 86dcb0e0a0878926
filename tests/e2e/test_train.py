"""A training run as a user starts it, with real Ray, vLLM, FSDP2 and MLflow, and its continuation in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from dvpo_service.algo.loss_spec import TERMS
from dvpo_service.export.export import export, open_export
from dvpo_service.models.critic import DistributionalCritic
from dvpo_service.models.load import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
STEPS = 16


WARMSTART = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "max_positions": 64,
    "steps": 20,
    "batch_size": 32,
    "world_size": 2,
}


def write_config(folder: Path, model: Path | None = None) -> Path:
    """Write a config: two splits, noisy rewards from a user's function, a reference policy, warm start or ``model``."""
    config = {
        "model": {"path": str(model)} if model else {"warmstart": WARMSTART},
        "data": {
            "train_files": "shipped:demo-train.jsonl",
            "val_files": {"id": "shipped:demo-val.jsonl", "ood": "shipped:demo-ood.jsonl"},
            "max_prompt_tokens": 16,
            "val_limit": 32,
        },
        "rollout": {"prompts_per_step": 16, "n": 8, "max_new_tokens": 8, "enforce_eager": True},
        "reward": {"function": "tests.e2e.rewards:short_answer", "noise": {"kind": "flip", "p": 0.05}},
        "algorithm": {"n_quantiles": 20, "critic_hidden_dim": 32},
        "critic": {"mini_batch_size": 64, "optim": {"lr": 1e-3}},
        "policy": {"mini_batch_size": 64, "optim": {"lr": 1e-3}, "kl": {"coef": 0.001}},
        "trainer": {"num_steps": STEPS, "eval_every": 8, "save_every": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def dvpo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "dvpo_service", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, then a second one in its folder with more steps, which continues it: in one process, without actors."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder)
    run = folder / "tiny"
    for steps, keys in ((STEPS - 4, []), (STEPS, ["cluster.in_process=true"])):
        done = dvpo("train", "--config", str(config), "--run-dir", str(run), f"trainer.num_steps={steps}", *keys)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (run / f"terminal-{steps}.txt").write_text(done.stdout)
    return run


@pytest.fixture(scope="module")
def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises(rows: list[dict[str, Any]]) -> None:
    clean = [r["reward/clean_mean"] for r in rows[1:]]
    assert sum(clean[-4:]) / 4 > sum(clean[:4]) / 4 + 0.1
    assert rows[-1]["eval/id/accuracy"] > rows[0]["eval/id/accuracy"] + 0.1


def test_every_step_stands_once_with_every_loss_component(rows: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        for term in TERMS:
            assert row[f"critic/loss/{term}"] is not None
            assert row[f"critic/weighted/{term}"] is not None
        assert {"critic/dvpo_loss", "critic/quantile_mean", "policy/loss", "policy/entropy"} <= row.keys()
        assert row["reward/failed"] == 0


def test_the_engine_samples_from_the_trainers_policy_at_every_step(rows: list[dict[str, Any]]) -> None:
    assert all(r["policy/rollout_kl"] < 1e-8 for r in rows[1:])
    assert all(r["rollout/staleness"] == 0 for r in rows[1:])


def test_the_summary_says_what_happened(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["held_out_before"] == {k: rows[0][f"eval/{k}/accuracy"] for k in ("id", "ood")}
    assert summary["held_out_after"] == {k: rows[-1][f"eval/{k}/accuracy"] for k in ("id", "ood")}
    assert summary["held_out_greedy_after"] == {k: rows[-1][f"eval/{k}/greedy"] for k in ("id", "ood")}
    assert all(Path(summary["where"][k]).exists() for k in ("run", "policy", "metrics", "checkpoints"))


def test_one_mlflow_run_holds_it_all(run_dir: Path) -> None:
    where = json.loads((run_dir / "summary.json").read_text())["where"]
    client = MlflowClient(where["mlflow_tracking_uri"])
    [experiment] = [e for e in client.search_experiments() if e.name == "dvpo"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == where["mlflow_run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["algorithm.n_quantiles"] == "20"
    history = client.get_metric_history(run.info.run_id, "critic/loss/cvar")
    assert sorted(m.step for m in history) == list(range(1, STEPS + 1))
    top = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "figures", "samples.json"} <= top
    assert client.list_artifacts(run.info.run_id, "figures/value_fan")


def test_the_terminal_shows_plan_progress_and_results(run_dir: Path) -> None:
    first, second = ((run_dir / f"terminal-{s}.txt").read_text() for s in (STEPS - 4, STEPS))
    assert "16 prompts x 8" in first
    assert f"step 1/{STEPS - 4}" in first
    assert f"at step {STEPS - 4}" in second
    assert "held-out, mean reward" in second, "the reward is graded"
    assert str(run_dir / "summary.json") in second.replace("\n", "")


def test_the_exported_policy_loads_and_scores_the_same(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    policy = run_dir / "policy"
    model, tokenizer = load_causal_lm(str(policy)), load_tokenizer(str(policy))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+7="}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert model(**prompt).logits.isfinite().all()

    output = run_dir / "eval.json"
    # The checkpoint at which the actors ended: what follows was sampled by transformers, with other random numbers.
    step = STEPS - 4
    source = str(run_dir / "checkpoints" / f"step-{step:06d}")
    done = dvpo("eval", "--run", source, "--n", "4", "--output", str(output), "cluster.in_process=false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pass@4" in done.stdout
    results = json.loads(output.read_text())
    assert results["step"] == step
    for split in ("id", "ood"):
        figures = results["splits"][split]
        assert figures["prompts"] == 32
        for name in ("accuracy", "greedy"):
            assert figures[name] == pytest.approx(rows[step][f"eval/{split}/{name}"], abs=0.02)


def test_checkpoints_export_to_what_training_exports(run_dir: Path) -> None:
    last = export(run_dir / "checkpoints" / f"step-{STEPS:06d}", run_dir / "from-checkpoint")
    final = open_export(run_dir / "policy")
    assert last.step == final.step == STEPS
    assert last.mlflow_run_id == final.mlflow_run_id
    for file in ("model.safetensors", "critic/model.safetensors"):
        one, two = (load_file(e.folder / file) for e in (last, final))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert DistributionalCritic.from_pretrained(final.folder / "critic").spec.num_quantiles == 20
    assert f"Before training, and after {STEPS} updates." in (final.folder / "README.md").read_text()

    done = dvpo(
        *("export", "--run", str(run_dir / "checkpoints" / f"step-{STEPS - 4:06d}")),
        *("--output", str(run_dir / "earlier"), "--register", "tiny"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"policy after {STEPS - 4} updates: {run_dir / 'earlier'}" in done.stdout
    where = json.loads((run_dir / "summary.json").read_text())["where"]
    version = MlflowClient(where["mlflow_tracking_uri"]).get_model_version("tiny", "1")
    assert version.run_id == where["mlflow_run_id"]


def test_an_estimator_without_a_critic_learns_without_its_pool(run_dir: Path) -> None:
    """GRPO with dynamic sampling, packing, adapters and the overlong penalty, from the same base model."""
    config = str(run_dir.parent / "tiny.yaml")
    run = run_dir.parent / "grpo"
    keys = ["algorithm.adv_estimator=grpo", "policy.loss_agg=seq_mean_token_mean", "policy.packing=true"]
    keys += ["policy.lora={rank: 8}", "policy.optim.lr=1e-2"]
    keys += ["rollout.dynamic_sampling=true", "reward.overlong_buffer=2", "policy.dual_clip=3", "trainer.num_steps=8"]
    done = dvpo("train", "--config", config, "--run-dir", str(run), *keys)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith("critic/") for name in rows[-1])
    assert open_export(run / "policy").critic is None
    assert (run / "policy" / "adapter" / "adapter_model.safetensors").exists()
    assert all(r["policy/rollout_kl"] < 1e-8 for r in rows[1:]), "packed, with adapters; the engine has merged weights"
    assert all(1 <= r["rollout/draws"] <= 4 for r in rows[1:])
    clean = [r["reward/clean_mean"] for r in rows[1:]]
    assert sum(clean[-2:]) > sum(clean[:2])


def test_nothing_is_left_running(run_dir: Path) -> None:
    left = [
        p.info["cmdline"]
        for p in psutil.process_iter(["cmdline"])
        if any(str(run_dir.parent) in part for part in p.info["cmdline"] or [])
    ]
    assert left == []
