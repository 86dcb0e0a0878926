"""``model.dtype=bfloat16``: backbones compute in bfloat16, heads and log-probs in float32. Real FSDP2 modules."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.cluster.pool import Rendezvous
from actors.training.critic import CriticWorker
from actors.training.policy import PolicyWorker
from dvpo_service.host.network import free_port
from dvpo_service.models.whole import whole
from tests.builders import make_config, make_rollouts
from tests.processes import run_ranks

Dtypes = dict[str, set[torch.dtype]]


def watch(module: nn.Module) -> Dtypes:
    """Return a set for the backbone and one for the critic's heads, which fill with their linear layers' dtypes."""
    seen: Dtypes = {"backbone": set(), "value": set()}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            part = seen[name.split(".")[0]]
            layer.register_forward_hook(lambda m, x, y, part=part: part.update({x[0].dtype, m.weight.dtype, y.dtype}))
    return seen


def run(kind: Any, dtype: str, model: str) -> tuple[Tensor, Tensor, Dtypes]:
    """Return log-probs or values in the batch's order, the gradient of an update, and the dtypes of the layers."""
    config = make_config(model, policy={"mini_batch_size": 16}, critic={"mini_batch_size": 16})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})
    worker = kind(config, model, Rendezvous(0, 1, "127.0.0.1", free_port(), 60))
    seen = watch(worker.trainer.module)
    gradients: list[Tensor] = []

    def capture() -> None:
        grads = [whole(p.grad).flatten() for p in worker.trainer.module.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))

    worker.trainer.optimizer.step = capture
    rollouts = make_rollouts(seed=3)
    if kind is CriticWorker:
        answer = worker.evaluate(rollouts, {}, 0)[0]
        outputs = answer.values
        worker.update()
    else:
        answer = worker.logprobs(rollouts, 0)
        outputs = answer.logprobs
        before = {"logprobs": outputs[answer.rows.argsort()]}  # all ratios are 1, and none near a clip
        worker.update(rollouts, before, torch.ones(rollouts.rewards.shape), 0)
    torch.distributed.destroy_process_group()
    return outputs[answer.rows.argsort()], gradients[0], seen


def check_reference(model: str) -> None:
    """The reference takes half the bytes, and gives what the policy gives before its first step, to the bit."""
    config = make_config(model, model={"dtype": "bfloat16"}, policy={"kl": {"coef": 0.1}})
    worker = PolicyWorker(config, model, Rendezvous(0, 1, "127.0.0.1", free_port(), 60))
    assert {p.dtype for p in worker.reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in worker.trainer.module.parameters()} == {torch.float32}
    scored = worker.logprobs(make_rollouts(seed=3), 0)
    assert scored.ref_logprobs is not None
    assert torch.equal(scored.logprobs, scored.ref_logprobs)
    torch.distributed.destroy_process_group()


def _process(rank: int, model: str) -> None:
    torch.set_num_threads(1)
    check_reference(model)
    for kind in (PolicyWorker, CriticWorker):
        outputs, gradient, low = run(kind, "bfloat16", model)
        wanted, exact, high = run(kind, "float32", model)
        assert high["backbone"] == {torch.float32}
        assert low["backbone"] == {torch.bfloat16}
        assert low["value"] == high["value"], "the heads compute in float32"
        assert outputs.dtype == gradient.dtype == torch.float32
        assert 0 < (outputs - wanted).norm() < 0.02 * wanted.norm()
        assert 0 < (gradient - exact).norm() < 0.1 * exact.norm()
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


def test_backbones_compute_in_bfloat16_heads_in_float32_and_the_reference_is_kept_in_bfloat16(tiny_model: Path) -> None:
    run_ranks(_process, (str(tiny_model),), 1)
