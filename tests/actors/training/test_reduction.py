"""Gradients are reduced after every micro-batch, so that a rank keeps those of its own shard. Real gloo groups."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from actors.cluster.pool import Rendezvous
from actors.training.policy import PolicyWorker
from actors.training.trainer import clip_grad_norm
from dvpo_service.host.network import free_port
from dvpo_service.models.whole import whole
from tests.builders import make_config, make_rollouts
from tests.processes import run_ranks

WORLDS = (1, 2)  # 4 works too, and takes four processes


def retained(module: torch.nn.Module) -> int:
    """Return the bytes of all gradients that this rank holds, sharded and not."""
    grads: list[Any] = [p.grad for p in module.parameters()]
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in part._get_fsdp_state()._fsdp_param_groups:
                for p in group.fsdp_params:
                    grads += [p.unsharded_accumulated_grad, getattr(getattr(p, "_unsharded_param", None), "grad", None)]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in grads if g is not None]
    return sum(g.numel() * g.element_size() for g in local)


def one_step(worker: PolicyWorker) -> dict[str, Any]:
    """Return the bytes retained before each micro-batch, and the gradient; the step is not taken."""
    module = worker.trainer.module
    bytes_before: list[int] = []
    gradients: list[Tensor] = []
    losses = worker._losses

    def watched(*args: Any) -> list[Any]:
        def first_count(compute: Any) -> Any:
            bytes_before.append(retained(module))
            return compute()

        return [lambda c=c: first_count(c) for c in losses(*args)]

    def capture() -> None:
        gradients.append(torch.cat([whole(p.grad).flatten() for p in module.parameters()]))

    worker._losses = watched  # type: ignore[method-assign]
    worker.trainer.optimizer.step = capture  # type: ignore[method-assign]
    rollouts = make_rollouts(seed=3)
    advantages = torch.randn(rollouts.rewards.shape, generator=torch.Generator().manual_seed(0))
    worker.update(rollouts, {"logprobs": rollouts.rollout_logprobs}, advantages, 0)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return {"retained": [b / size for b in bytes_before], "gradient": gradients[0]}


def clip_over_two_meshes(world: int) -> None:
    """Check the norm, and the clipped gradients, of parameters on two meshes and of one that is not sharded."""
    shapes = {(world,): [Shard(0)], (1, world): [Replicate(), Shard(0)]}
    whole = [torch.arange(8.0).view(4, 2) + i for i in range(3)]
    parameters: list[torch.nn.Parameter] = [torch.nn.Parameter(torch.zeros(4, 2))]
    parameters[0].grad = whole[0].clone()
    for gradient, (shape, placements) in zip(whole[1:], shapes.items(), strict=True):
        mesh = init_device_mesh("cpu", shape)
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, placements))
        p.grad = distribute_tensor(gradient.clone(), mesh, placements)
        parameters.append(p)
    wanted = torch.cat(whole).norm()
    torch.testing.assert_close(clip_grad_norm(parameters, 2.0), wanted)
    for p, gradient in zip(parameters, whole, strict=True):
        mine = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(mine, gradient * 2.0 / wanted)


def _rank(rank: int, ports: dict[tuple[int, bool], int], model: str, out: str) -> None:
    """Take part in every group that is large enough to have this rank, one after the other."""
    torch.set_num_threads(1)
    for (world, defer), port in ports.items():
        if rank >= world:
            continue
        optim = {"lr": 1e-3, "max_grad_norm": 1e9}
        policy = {"world_size": world, "micro_batch_size": 1, "mini_batch_size": 16, "optim": optim}
        config = make_config(model, policy=policy | {"defer_gradient_reduction": defer})
        worker = PolicyWorker(config, model, Rendezvous(rank, world, "127.0.0.1", port, 120))
        torch.save(one_step(worker), f"{out}/{world}-{defer}-{rank}.pt")
        clip_over_two_meshes(world)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort the interpreter's own shutdown


def measure(model: Path, folder: Path) -> dict[tuple[int, bool], list[dict[str, Any]]]:
    """Return what ``one_step`` measured on each rank, by (number of ranks, deferred)."""
    ports = {(world, defer): free_port() for world in WORLDS for defer in (False, True)}
    run_ranks(_rank, (ports, str(model), str(folder)), max(WORLDS))
    return {
        (world, defer): [torch.load(folder / f"{world}-{defer}-{r}.pt") for r in range(world)] for world, defer in ports
    }


def test_a_rank_keeps_the_gradient_of_its_own_shard(tiny_model: Path, tmp_path: Path) -> None:
    results = measure(tiny_model, tmp_path)
    wanted = results[1, False][0]["gradient"]
    assert wanted.norm() > 1e-3
    for (world, defer), ranks in results.items():
        for rank in ranks:
            first, *later = rank["retained"]
            assert first == 0
            assert len(later) == 16 // world - 1
            kept = 1.0 if defer else 1 / world
            assert all(abs(share - kept) < 0.02 for share in later), (world, defer, later)
            assert (rank["gradient"] - wanted).norm() <= 1e-5 * wanted.norm(), (world, defer)
