"""Adapters save the memory that the plan says: the bytes of gradients and of Adam's moments in a worker that trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.cluster.pool import Rendezvous
from actors.training.policy import PolicyWorker
from dvpo_service.capacity.memory import devices
from dvpo_service.capacity.shape import model_shape
from dvpo_service.config import Config
from dvpo_service.host.network import free_port
from tests.builders import make_config, make_rollouts


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def planned(config: Config, part: str) -> float:
    """Return the bytes that the plan has for a part of the policy, 0 where there is no such part."""
    policy = devices(config, model_shape(config))[0]
    return sum(p.size for p in policy.parts if p.name.startswith(part))


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_gradients_and_moments_are_as_planned(lora: dict[str, Any] | None, tiny_model: Path) -> None:
    config = make_config(tiny_model, policy={"lora": lora, "kl": {"coef": 0.1}, "mini_batch_size": None})
    worker = PolicyWorker(config, str(tiny_model), Rendezvous(0, 1, "127.0.0.1", free_port(), 60.0))
    gradients: dict[int, int] = {}

    def count(p: torch.Tensor) -> None:
        assert p.grad is not None
        gradients[id(p)] = p.grad.nbytes

    for p in worker.trainer.module.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(count)
    rollouts = make_rollouts()
    scored = worker.logprobs(rollouts, 0)
    changes = {"logprobs": scored.logprobs[scored.rows.argsort()]}
    assert scored.ref_logprobs is not None
    changes["ref_logprobs"] = scored.ref_logprobs[scored.rows.argsort()]
    worker.update(rollouts, changes, torch.ones_like(rollouts.rewards), 0)
    moments = sum(x.nbytes for s in worker.trainer.optimizer.state.values() for x in s.values() if x.ndim)
    assert sum(gradients.values()) == planned(config, "gradients")
    assert moments == planned(config, "optimizer")
    assert (worker.reference is None) == bool(lora) == (planned(config, "reference") == 0)
    if lora:
        assert moments < 0.05 * planned(make_config(tiny_model), "optimizer")
