"""The split of the work over ranks, micro-batches and padding changes no result. Real gloo process groups."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from dvpo_service.config import Config
from dvpo_service.runs.storage import is_url, make_folder, storage_path
from dvpo_service.types import Metrics
from tests.builders import make_config, make_rollouts, sums_of
from tests.processes import run_ranks

STEPS = 2


def critic_run(config: Config, model: str, meet: Rendezvous) -> tuple[list[Tensor], list[Metrics]]:
    worker = CriticWorker(config, model, meet)
    tensors, metrics = [], []
    for step in range(STEPS):
        values, measured = worker.evaluate(make_rollouts(seed=step), {}, step)
        metrics.append(measured | worker.update())
        tensors += [values.rows, values.advantages, values.values]
    return tensors, metrics


def policy_run(config: Config, model: str, meet: Rendezvous) -> tuple[list[Tensor], list[Metrics]]:
    worker = PolicyWorker(config, model, meet)
    tensors, metrics = [], []
    for step in range(STEPS):
        results, measured = policy_step(worker, step)
        tensors += results
        metrics.append(measured)
    return tensors, metrics


def policy_step(worker: PolicyWorker, step: int) -> tuple[list[Tensor], Metrics]:
    rollouts = make_rollouts(seed=step)
    advantages = torch.randn(rollouts.rewards.shape, generator=torch.Generator().manual_seed(step))
    # Near an untrained model's log-probs, so that some ratios are clipped and some are not.
    near = torch.where(rollouts.response_mask, rollouts.rollout_logprobs * 0.2 - 5.5, 0.0)
    measured = worker.update(rollouts, {"logprobs": near, "ref_logprobs": near}, advantages, step)
    scored = worker.logprobs(rollouts, step)
    assert scored.ref_logprobs is not None
    return [scored.rows, scored.logprobs, scored.ref_logprobs], measured


def _rank(rank: int, world: int, port: int, run: Any, config: Config, model: str, out: str) -> None:
    torch.set_num_threads(1)
    result = run(config, model, Rendezvous(rank, world, "127.0.0.1", port, 120))
    torch.save(result, f"{out}/{rank}.pt")
    torch.distributed.barrier()
    # gloo's threads can abort the interpreter's own shutdown; a Ray actor is killed and never gets there.
    os._exit(0)


def launch(run: Any, config: Config, model: Path, world: int, out: Path) -> tuple[list[Tensor], list[Metrics]]:
    """Run on ``world`` ranks and return the results as one rank would give them: tensors in the batch's order."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir()
    run_ranks(_rank, (world, port, run, config, str(model), str(out)), world)
    ranks = [torch.load(out / f"{i}.pt", weights_only=False) for i in range(world)]
    assert all(r[1] == ranks[0][1] for r in ranks), "every rank reports the same, global figures"
    tensors = []
    for step in range(STEPS):
        rows, *values = (torch.cat([r[0][3 * step + i] for r in ranks]) for i in range(3))
        order = rows.argsort()
        tensors += [v[order] for v in values]
    return tensors, ranks[0][1]


def assert_same(a: tuple[list[Tensor], list[Metrics]], b: tuple[list[Tensor], list[Metrics]]) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    for x, y in zip(a[1], b[1], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    "kind",
    [
        {"form": "paper"},
        {"form": "calibrated"},
        {"form": "robust", "advantage": "huber"},
        {"adv_estimator": "robust_gae", "robust_rho": 0.1},
        {"lora": {"rank": 4}},
    ],
    ids=["paper", "calibrated", "robust", "robust_gae", "lora"],
)
def test_critic_gives_the_same_on_two_ranks_and_in_other_micro_batches(
    kind: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    algorithm = {"n_quantiles": 20, "critic_hidden_dim": 32} | {k: v for k, v in kind.items() if k != "lora"}
    critic = {"epochs": 2, "lora": kind.get("lora")}
    one = make_config(tiny_model, algorithm=algorithm, critic=critic | {"micro_batch_size": 8})
    sizes = {"world_size": 2, "micro_batch_size": 3, "max_tokens_per_micro_batch": 24}
    two = make_config(tiny_model, algorithm=algorithm, critic=critic | sizes, data={"max_prompt_tokens": 8})
    first = launch(critic_run, one, tiny_model, 1, tmp_path / "one")
    assert_same(first, launch(critic_run, two, tiny_model, 2, tmp_path / "two"))
    scalar = "adv_estimator" in kind
    losses = [m["critic/value_loss" if scalar else "critic/dvpo_loss"] for m in first[1]]
    assert all(torch.isfinite(torch.tensor(losses)))
    terms = {f"critic/loss/{t}" for t in ("qr", "risk", "cvar", "gain", "shift", "shape", "curv", "consist")}
    assert scalar or terms <= first[1][0].keys()


def test_policy_gives_the_same_on_two_ranks_and_in_other_micro_batches(tiny_model: Path, tmp_path: Path) -> None:
    policy = {"kl": {"coef": 0.1, "where": "loss"}, "entropy_coef": 0.01, "epochs": 2, "optim": {"lr": 1e-3}}
    one = make_config(tiny_model, policy=policy | {"micro_batch_size": 8})
    sizes = {"world_size": 2, "micro_batch_size": 3, "max_tokens_per_micro_batch": 24}
    two = make_config(tiny_model, policy=policy | sizes, data={"max_prompt_tokens": 8})
    first = launch(policy_run, one, tiny_model, 1, tmp_path / "one")
    assert_same(first, launch(policy_run, two, tiny_model, 2, tmp_path / "two"))
    assert 0 < first[1][0]["policy/clip_fraction"] < 1
    before, after = first[0][0], first[0][2]
    assert not torch.equal(before, after), "the policy moved"


def resume_run(config: Config, model: str, meet: Rendezvous) -> tuple[list[Tensor], list[Metrics]]:
    """Train, save, continue; then load into a fresh critic, continue again, and check that both results are equal."""
    folder = f"{config.trainer.run_dir}/{meet.world_size}"
    worker = CriticWorker(config, model, meet)
    worker.evaluate(make_rollouts(seed=0), {}, 0)
    worker.update()
    if meet.rank == 0:
        make_folder(storage_path(folder))
    torch.distributed.barrier()
    worker.save(folder)
    straight = worker.evaluate(make_rollouts(seed=1), {}, 1)[0]
    after = worker.update()
    written = worker.saved(True)
    assert written
    assert written == {name: sums_of(storage_path(folder))[name] for name in written}, "as the rank that wrote it says"
    torch.distributed.barrier()
    fresh = CriticWorker.__new__(CriticWorker)
    fresh.__dict__.update(worker.__dict__)
    with torch.no_grad():
        for parameter in fresh.trainer.module.parameters():
            parameter.zero_()
    fresh.trainer.extra["later"] = torch.ones(2)
    fresh.load(folder)
    assert torch.equal(fresh.trainer.extra.pop("later"), torch.ones(2)), "what an earlier version did not save"
    again = fresh.evaluate(make_rollouts(seed=1), {}, 1)[0]
    assert torch.equal(again.values, straight.values), "a checkpoint restores the weights to the bit"
    assert fresh.update() == after, "and the optimizer, schedule and running moments"
    if not is_url(folder):
        _meet_a_full_disk(worker, f"{folder}-full")
    return [straight.rows, straight.advantages, straight.values] * STEPS, [after] * STEPS


def _meet_a_full_disk(worker: CriticWorker, folder: str) -> None:
    """Check that an error of the writing thread is raised by ``saved``, and that the next save works."""
    os.makedirs(folder, exist_ok=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    worker.save(folder)
    with pytest.raises(OSError, match="too large"):
        worker.saved(True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    worker.save(folder)
    assert worker.saved(True)


def continued_run(config: Config, model: str, meet: Rendezvous) -> tuple[list[Tensor], list[Metrics]]:
    """Continue from the checkpoint that one rank wrote in ``resume_run``, as ``resume_run`` itself did."""
    worker = CriticWorker(config, model, meet)
    worker.load(f"{config.trainer.run_dir}/1")
    values, _ = worker.evaluate(make_rollouts(seed=1), {}, 1)
    return [values.rows, values.advantages, values.values] * STEPS, [worker.update()] * STEPS


def test_two_ranks_continue_what_one_has_saved(tiny_model: Path, tmp_path: Path) -> None:
    def config(world: int) -> Config:
        critic = {"world_size": world, "optim": {"lr": 1e-3}}
        algorithm = {"n_quantiles": 20, "critic_hidden_dim": 32}
        return make_config(tiny_model, algorithm=algorithm, critic=critic, trainer={"run_dir": f"{tmp_path}/state"})

    one = launch(resume_run, config(1), tiny_model, 1, tmp_path / "one")
    assert_same(one, launch(continued_run, config(2), tiny_model, 2, tmp_path / "two"))


def saved_policy_run(config: Config, model: str, meet: Rendezvous) -> tuple[list[Tensor], list[Metrics]]:
    worker = PolicyWorker(config, model, meet)
    policy_step(worker, 0)
    worker.save(str(config.trainer.run_dir))
    worker.saved(True)
    tensors, metrics = policy_step(worker, 1)
    return tensors * STEPS, [metrics] * STEPS


def continued_policy_run(config: Config, model: str, meet: Rendezvous) -> tuple[list[Tensor], list[Metrics]]:
    worker = PolicyWorker(config, model, meet)
    worker.load(str(config.trainer.run_dir))
    tensors, metrics = policy_step(worker, 1)
    return tensors * STEPS, [metrics] * STEPS


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["", "lora"])
def test_one_rank_continues_what_two_have_saved(lora: dict[str, Any] | None, tiny_model: Path, tmp_path: Path) -> None:
    def config(world: int) -> Config:
        policy = {"world_size": world, "kl": {"coef": 0.1, "where": "loss"}, "optim": {"lr": 1e-3}, "lora": lora}
        return make_config(tiny_model, policy=policy, trainer={"run_dir": f"{tmp_path}/state"})

    (tmp_path / "state").mkdir()
    two = launch(saved_policy_run, config(2), tiny_model, 2, tmp_path / "two")
    assert_same(two, launch(continued_policy_run, config(1), tiny_model, 1, tmp_path / "one"))


@pytest.mark.parametrize("where", ["path", "s3"])
def test_a_checkpoint_restores_a_rank_to_the_bit(
    where: str, request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path
) -> None:
    base = request.getfixturevalue("bucket") if where == "s3" else str(tmp_path)
    algorithm = {"n_quantiles": 20, "critic_hidden_dim": 32, "form": "calibrated"}
    optim = {"lr": 1e-3, "warmup_steps": 3, "schedule": "cosine"}
    config = make_config(
        tiny_model,
        algorithm=algorithm,
        critic={"world_size": 2, "optim": optim},
        trainer={"run_dir": f"{base}/state"},
    )
    launch(resume_run, config, tiny_model, 2, tmp_path / "out")
