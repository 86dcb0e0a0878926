"""Empty responses, responses of only an end-of-sequence token, prompts of one token: they train, or change nothing.

One process with a real gloo group of one and real FSDP2 modules.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from actors.training.roles import engine_mismatch
from dvpo_service.algo.advantages import whiten
from dvpo_service.config import Config
from dvpo_service.data.collate import collate, readable_rows, rollout_metrics
from dvpo_service.estimators.group import GroupEstimator
from dvpo_service.host.network import free_port
from dvpo_service.models.whole import gathered, saved
from dvpo_service.types import Prompt, Rollouts, Sample, Score
from tests.builders import make_config
from tests.ports import listening
from tests.processes import run_ranks

EOS = 1
RESPONSES: dict[str, list[tuple[int, ...]]] = {
    "all empty": [()] * 8,  # must be first: later, Adam's momentum moves the weights without a gradient too
    "some empty": [(), (7, 8, EOS), (), (9,), (EOS,), (), (5, 5, 5, EOS), (6, EOS)],
    "only the end": [(EOS,)] * 8,
}
ESTIMATORS: list[dict[str, Any]] = [
    {"form": "paper"},
    {"form": "calibrated"},
    {"form": "robust", "advantage": "huber"},
    {"adv_estimator": "gae"},
    {"adv_estimator": "robust_gae", "robust_rho": 0.1},
]
GROUPED = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus")


def batch_of(responses: list[tuple[int, ...]]) -> Rollouts:
    """Return a batch of two prompts, of one and five tokens, with four responses each; every other one is right."""
    prompts = [Prompt(i, ({"role": "user", "content": "?"},), "1", "t", (5,) * (1 + 4 * i)) for i in range(2)]
    flat = [Sample(i // 4, i % 4, ids, (-0.5,) * len(ids), "", "stop", 0) for i, ids in enumerate(responses)]
    groups = [flat[:4], flat[4:]]
    scores = [[Score(float(j % 2), float(j % 2)) for j in range(4)]] * 2
    assert len(readable_rows(prompts, groups, scores)) == 8
    rollouts = collate(prompts, groups, scores)
    metrics = rollout_metrics(rollouts, 4, version=0)
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["rollout/tokens"] == sum(map(len, responses))
    return rollouts


def parameters(worker: Any) -> torch.Tensor:
    return torch.cat([p.flatten() for _, p in gathered(saved(worker.trainer.module))])


def updated(worker: Any, metrics: dict[str, float], before: torch.Tensor, pool: str, tokens: int) -> None:
    """Check that the update trained on the batch's tokens, or changed nothing if it had no token."""
    assert metrics[f"{pool}/skipped_steps"] == 0
    assert math.isfinite(metrics[f"{pool}/grad_norm"])
    after = parameters(worker)
    assert after.isfinite().all()
    assert torch.equal(after, before) == (tokens == 0)


def one(config: Config, model: str) -> None:
    port = free_port()
    meet = Rendezvous(0, 1, "127.0.0.1", port, 60)
    critic = CriticWorker(config, model, meet)
    assert [a for a, p in listening(psutil.Process()) if p == port] == ["127.0.0.1"], (
        "torch's own choice is all of them"
    )
    with patch(
        "actors.training.policy.init_process_group", lambda meet: critic.device
    ):  # both workers share this process's group
        policy = PolicyWorker(config, model, meet)
    for name, responses in RESPONSES.items():
        rollouts = batch_of(responses)
        scored = policy.logprobs(rollouts, 0)
        order = scored.rows.argsort()
        rollouts = rollouts.with_(logprobs=scored.logprobs[order])
        engine_mismatch(rollouts)
        estimate, metrics = critic.evaluate(rollouts, {}, 0)
        assert estimate.advantages.shape == estimate.values.shape == rollouts.response_mask.shape, name
        assert estimate.advantages.isfinite().all()
        if rollouts.num_tokens:
            assert all(math.isfinite(v) for k, v in metrics.items() if "/loss" in k), metrics
        before = parameters(critic)
        updated(critic, critic.update(), before, "critic", rollouts.num_tokens)
        every = [GroupEstimator(config.algorithm.model_copy(update={"adv_estimator": e})) for e in GROUPED]
        advantages = [estimate.advantages[estimate.rows.argsort()]]
        advantages += [e.advantages(rollouts, 0)[0].advantages for e in every]
        for values in advantages:
            assert values.isfinite().all()
            mask = rollouts.response_mask
            values = whiten(values, mask).float()
            before = parameters(policy)
            metrics = policy.update(rollouts, {}, values, 0)
            updated(policy, metrics, before, "policy", rollouts.num_tokens)
    torch.distributed.destroy_process_group()


def _process(rank: int, configs: list[Config], model: str) -> None:
    torch.set_num_threads(1)
    for config in configs:
        one(config, model)
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


def test_updates_on_empty_responses(tiny_model: Path) -> None:
    base = {"n_quantiles": 8, "critic_hidden_dim": 16, "n_heads": 2}
    configs = []
    for i, algorithm in enumerate(ESTIMATORS):
        pool = {"mini_batch_size": 8, "micro_batch_size": 3, "packing": i % 2 == 0}
        sections: dict[str, Any] = {"critic": pool, "policy": pool, "algorithm": base | algorithm}
        configs.append(make_config(tiny_model, rollout={"prompts_per_step": 2, "n": 4}, **sections))
    run_ranks(_process, (configs, str(tiny_model)), 1)
