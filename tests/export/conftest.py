"""Run directories with real checkpoints, written by trainers in gloo process groups."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from dvpo_service.config import Config, to_yaml
from dvpo_service.models.base import save_base
from dvpo_service.models.load import load_causal_lm, load_tokenizer
from dvpo_service.models.whole import gathered
from dvpo_service.runs.integrity import write_record
from tests.builders import make_config, make_rollouts, sums_of
from tests.processes import run_ranks

STEP = 3
STATE = {"state": {"step": STEP}, "mlflow_run_id": "run-7"}


def _rank(rank: int, world: int, ports: list[int], config: Config, model: str, run: str, checkpoint: str) -> None:
    """Train both pools for one step, save a checkpoint, export, and keep the module's whole state to compare with."""
    torch.set_num_threads(1)
    rollouts = make_rollouts()
    policy = PolicyWorker(config, model, Rendezvous(rank, world, "127.0.0.1", ports[0], 120))
    policy.update(rollouts, {"logprobs": rollouts.rollout_logprobs}, torch.ones(rollouts.rewards.shape), 0)
    policy.save(f"{checkpoint}/policy")
    policy.saved(True)
    dist.barrier()
    policy.load(f"{checkpoint}/policy")
    policy.export(f"{run}/live/policy")
    state = dict(gathered(policy.trainer.module.backbone.state_dict().items()))
    dist.destroy_process_group()
    critic = CriticWorker(config, model, Rendezvous(rank, world, "127.0.0.1", ports[1], 120))
    critic.evaluate(rollouts, {}, 0)
    critic.update()
    critic.save(f"{checkpoint}/estimator")
    critic.saved(True)
    critic.export(f"{run}/live/critic")
    critic_state = dict(gathered(critic.trainer.module.state_dict().items()))
    if rank == 0:
        save_file({k: v.clone() for k, v in state.items()}, f"{run}/live/policy-state.safetensors")
        save_file(critic_state, f"{run}/live/critic-state.safetensors")
    dist.barrier()
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def write_run(run: Path, config: Config, model: Path, world: int) -> None:
    """Write ``run`` as ``dvpo train`` leaves it when it is cut off after step 3.

    Its ``live/`` holds what the trainers exported themselves, to compare with.
    """
    checkpoint = run / "checkpoints" / f"step-{STEP:06d}"
    for folder in (checkpoint / "policy", checkpoint / "estimator", run / "live"):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    save_base(str(model), run)
    rows = [
        {"step": 0, "time": 0.0, "eval/val/accuracy": 0.25, "eval/val/greedy": 0.5},
        {"step": 2, "time": 1.0, "eval/val/accuracy": 0.75, "eval/val/greedy": None},
        {"step": STEP, "time": 2.0, "policy/loss": 0.1},
        {"step": STEP + 1, "time": 3.0, "eval/val/accuracy": 0.99, "eval/val/greedy": 0.99},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(_rank, (world, _free_ports(2), config, str(model), str(run), str(checkpoint)), world)
    write_record(checkpoint, STATE, sums_of(checkpoint))


def _train(model: Path, folder: Path, world: int) -> Path:
    pool = {"world_size": world, "optim": {"lr": 1e-2}}
    config = make_config(model, critic=pool, policy=pool, tracking={"mlflow_uri": "http://me:hush@host/mlflow"})
    write_run(folder / "run", config, model, world)
    return folder / "run"


@pytest.fixture(scope="session")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a DVPO run. Tests only read it."""
    return _train(tiny_model, tmp_path_factory.mktemp("trained"), 1)


@pytest.fixture(scope="session")
def trained_on_two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a DVPO run on two ranks: every tensor is in two files. Tests only read it."""
    return _train(tiny_model, tmp_path_factory.mktemp("trained-on-two"), 2)


@pytest.fixture(scope="session")
def tied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a scalar critic and a policy whose output layer is its input embedding. Tests only read it."""
    folder = tmp_path_factory.mktemp("tied")
    model: Any = load_causal_lm(str(tiny_model))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "model")
    load_tokenizer(str(tiny_model)).save_pretrained(folder / "model")
    pool = {"optim": {"lr": 1e-2}}
    config = make_config(folder / "model", algorithm={"adv_estimator": "gae"}, critic=pool, policy=pool)
    write_run(folder / "run", config, folder / "model", 1)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of ``trained`` that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
