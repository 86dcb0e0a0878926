"""A gradient does not depend on how the work is split: micro-batches, padding, order, packing.

test_ranks.py tests the split over ranks. One process with a real gloo group of one and real FSDP2 modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from dvpo_service.config import Config
from dvpo_service.host.network import free_port
from dvpo_service.models.whole import whole
from dvpo_service.types import Rollouts
from tests.builders import make_config, make_rollouts
from tests.processes import run_ranks

Run = Callable[[Any, Rollouts, Tensor], None]
OPTIM = {"lr": 1e-3, "max_grad_norm": 1e9}  # never clipped: the gradient itself is compared
LONGEST = 16  # tokens of a sequence, at most


def critic_update(worker: CriticWorker, rollouts: Rollouts, advantages: Tensor) -> None:
    worker.evaluate(rollouts, {}, 0)
    worker.update()


def policy_update(worker: PolicyWorker, rollouts: Rollouts, advantages: Tensor) -> None:
    near = torch.where(rollouts.response_mask, rollouts.rollout_logprobs * 0.2 - 5.5, 0.0)
    worker.update(rollouts, {"logprobs": near, "ref_logprobs": near}, advantages, 0)


def gradient_of(worker: Any, run: Run, rollouts: Rollouts, advantages: Tensor) -> Tensor:
    """Return all gradients of one optimizer step, flattened. The step itself is not taken."""
    gradients: list[Tensor] = []
    extra = {k: v.clone() for k, v in worker.trainer.extra.items()}

    def capture() -> None:
        grads = [p.grad for p in worker.trainer.module.parameters()]
        gradients.append(torch.cat([torch.zeros(0) if g is None else whole(g).flatten() for g in grads]))

    worker.trainer.optimizer.step = capture
    run(worker, rollouts, advantages)
    worker.trainer.extra = extra
    (gradient,) = gradients
    return gradient


def padded(rollouts: Rollouts, advantages: Tensor, more: int) -> tuple[Rollouts, Tensor]:
    """Return the same batch with ``more`` columns of padding."""

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, more))

    matrices = {k: wide(v) for k, v in vars(rollouts).items() if v is not None and v.dim() == 2}
    return rollouts.with_(**matrices), wide(advantages)


def reordered(rollouts: Rollouts, order: Tensor) -> Rollouts:
    return rollouts.with_(**{k: v[order] for k, v in vars(rollouts).items() if v is not None})


def check(worker: Any, pool: str, run: Run) -> None:
    rollouts = make_rollouts(seed=3)
    advantages = torch.randn(rollouts.rewards.shape, generator=torch.Generator().manual_seed(0))
    baseline = gradient_of(worker, run, rollouts, advantages)
    assert baseline.norm() > 1e-3
    tree = worker.config.model_dump()
    count = len(rollouts)

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(1, count),
        st.sampled_from([None, LONGEST, 40, 100]),
        st.permutations(range(count)),
        st.integers(0, 5),
        st.booleans(),
    )
    def cut(micro: int, tokens: int | None, order: list[int], padding: int, packing: bool) -> None:
        sizes = {"micro_batch_size": micro, "max_tokens_per_micro_batch": tokens, "packing": packing}
        worker.config = Config.model_validate(tree | {pool: tree[pool] | sizes})
        worker.trainer.module.packing = packing
        rows = torch.tensor(order)
        batch, adv = padded(reordered(rollouts, rows), advantages[rows], padding)
        gradient = gradient_of(worker, run, batch, adv)
        assert (gradient - baseline).norm() <= 1e-5 * baseline.norm(), (micro, tokens, order, padding, packing)

    cut()


def _process(rank: int, kind: Any, pool: str, run: Run, configs: list[Config], model: str) -> None:
    torch.set_num_threads(1)
    for config in configs:
        check(kind(config, model, Rendezvous(0, 1, "127.0.0.1", free_port(), 60)), pool, run)
        torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


def launch(kind: Any, pool: str, run: Run, model: Path, variants: list[dict[str, dict[str, Any]]]) -> None:
    """All variants in one process: starting one takes longer than checking one."""
    whole = {"mini_batch_size": None, "micro_batch_size": 16, "optim": OPTIM}
    data = {"max_prompt_tokens": 8}
    configs = [make_config(model, data=data, **(v | {pool: whole | v.get(pool, {})})) for v in variants]
    run_ranks(_process, (kind, pool, run, configs, str(model)), 1)


def test_of_the_critic(tiny_model: Path) -> None:
    base = {"n_quantiles": 20, "critic_hidden_dim": 32}
    algorithms: list[dict[str, Any]] = [
        {"form": "paper"},
        # Mixture targets flip coins by row, so a reordered batch would rightly have other targets.
        {"form": "calibrated", "critic_target": "gae"},
        {"adv_estimator": "gae"},
        {"adv_estimator": "robust_gae", "robust_rho": 0.1},
    ]
    launch(CriticWorker, "critic", critic_update, tiny_model, [{"algorithm": base | a} for a in algorithms])


def test_of_the_policy(tiny_model: Path) -> None:
    policy = {"kl": {"coef": 0.1}, "entropy_coef": 0.01, "dual_clip": 3.0}
    rollout = {"prompts_per_step": 4, "n": 4, "max_new_tokens": 8}
    rollout |= {"importance_correction": "masked", "importance_cap": 1e4}
    kinds = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
    variants: list[dict[str, dict[str, Any]]] = [
        {"policy": policy | {"loss_agg": kind}, "rollout": rollout} for kind in kinds
    ]
    launch(PolicyWorker, "policy", policy_update, tiny_model, variants)
