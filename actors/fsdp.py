"""Training a sharded module: process group, gradient accumulation, optimizer, state.

No Ray and no losses here: critic.py and policy.py hand in per-micro-batch losses.
Every rank calls every method in the same order.
"""

from __future__ import annotations

import datetime
import errno
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import get_scheduler

from actors.saving import BackgroundSaver
from dvpo_service.config import OptimConfig
from dvpo_service.integrity import Files
from dvpo_service.interfaces import listen, own_address, use_interface_of
from dvpo_service.storage import read_locally


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one pool meet."""

    rank: int
    world_size: int
    address: str
    port: int
    timeout_s: float


def init_process_group(meet: Rendezvous) -> torch.device:
    """Join the pool's process group (NCCL with a GPU, gloo without) and return this rank's device."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        use_interface_of(own_address(meet.address, meet.port))
    timeout = datetime.timedelta(seconds=meet.timeout_s)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=_store(meet, timeout),
        rank=meet.rank,
        world_size=meet.world_size,
        timeout=timeout,
    )
    return device


def _store(meet: Rendezvous, timeout: datetime.timedelta) -> dist.TCPStore:
    """The ranks' meeting point, at its address alone: torch would listen on all interfaces, and asks for no token."""
    descriptor = None
    if meet.rank == 0:
        try:
            descriptor = listen(meet.address, meet.port, shared=False).detach()
        except OSError as error:
            # An address that is translated on its way here is on no interface: torch's own choice then.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return dist.TCPStore(
        meet.address,
        meet.port,
        meet.world_size,
        is_master=meet.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


@dataclass
class StepReport:
    """What one call of ``Trainer.step`` did. A step with a non-finite loss or gradient is skipped."""

    loss: float
    grad_norm: float
    skipped: bool


class Trainer:
    """Optimizer steps on a sharded module."""

    def __init__(self, module: Any, config: OptimConfig, *, total_steps: int):
        self.module = module
        self.config = config
        self.optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        self.schedule = get_scheduler(
            name, self.optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
        )
        # A parameter that has several names, as an output layer that is the input embedding, is saved under one.
        first: dict[int, str] = {}
        self._names = {k: first.setdefault(id(p), k) for k, p in module.named_parameters(remove_duplicate=False)}
        # Further tensors to save with the state, the same on every rank.
        self.extra: dict[str, Tensor] = {}
        self._saver = BackgroundSaver()

    def step(self, losses: Iterable[Callable[[], Tensor]]) -> StepReport:
        """Accumulate the gradients of the micro-batches' losses and step once.

        Each loss is already divided by the global token count, so the gradient wanted is the plain
        sum over micro-batches and ranks; FSDP averages over ranks, hence the factor.
        """
        world, total, pending = dist.get_world_size(), 0.0, list(losses)
        for i, compute in enumerate(pending):
            self._reduce_gradients(i == len(pending) - 1)
            loss = compute()
            (loss * world).backward()
            total += float(loss.detach())
        total = float(all_reduce(torch.tensor(total, dtype=torch.float64), self.device))
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(total, grad_norm, skipped=not finite)

    @property
    def lr(self) -> float:
        return self.schedule.get_last_lr()[0]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _reduce_gradients(self, last: bool) -> None:
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)

    # State. Tensors go to sharded safetensors files (nothing is unpickled from disk), each rank
    # its own, and come back at any world size.

    def save(self, folder: str) -> None:
        """Write model, optimizer and schedule, as they are now, below ``folder``, a path or an fsspec URL.

        Collective. Returns before they are written: see ``saved``.
        """
        self._saver.start(self._tensors(*self._state()), folder)

    def saved(self, *, wait: bool) -> Files | None:
        """This rank's files of the last ``save``; None while they are being written. Raises what that met."""
        return self._saver.outcome(wait=wait)

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote, at any world size. Collective."""
        model, optim = self._state()
        tensors = self._tensors(model, optim)
        with read_locally(folder) as local:  # the reader maps files
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(local))
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict={k: tensors[f"model.{self._names.get(k, k)}"] for k in model},
            optim_state_dict={k: tensors.get(f"optim.{k}", v) for k, v in optim.items()},
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )
        self.extra = {k: tensors[f"extra.{k}"] for k in self.extra}
        self._set_schedule(int(tensors["schedule"]))

    def _set_schedule(self, steps_done: int) -> None:
        self.schedule.last_epoch = steps_done
        lrs = [base * f(steps_done) for base, f in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)]
        self.schedule._last_lr = lrs
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optim = get_state_dict(self.module, self.optimizer, options=options)
        return dict(model), dict(optim)

    def _tensors(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, Tensor]:
        """What changes in training. Hyper-parameters are the config's, not the checkpoint's."""
        tensors = {f"model.{k}": v for k, v in model.items() if self._names.get(k, k) == k}
        tensors |= {f"optim.{k}": v for k, v in optim.items() if k.startswith("state.")}
        tensors |= {f"extra.{k}": v for k, v in self.extra.items()}
        tensors["schedule"] = torch.tensor(self.schedule.last_epoch)
        return tensors


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole state of a sharded module, on the CPU of every rank. Collective."""
    return {
        name: p.full_tensor().cpu() if hasattr(p, "full_tensor") else p.cpu() for name, p in module.state_dict().items()
    }


def all_reduce(value: Tensor, device: torch.device) -> Tensor:
    """Sum over the pool's ranks, returned on the CPU."""
    value = value.to(device)
    dist.all_reduce(value)
    return value.cpu()


def all_reduce_min(value: Tensor, device: torch.device) -> Tensor:
    """The least over the pool's ranks, returned on the CPU."""
    value = value.to(device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value.cpu()


def add_up(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add ``more`` to the running sums, float64 on the CPU."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value.detach().double().cpu()


def all_reduce_sums(sums: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sum a dict of scalars over the ranks in one call; every rank has the same keys."""
    keys = sorted(sums)
    total = all_reduce(torch.stack([sums[k].detach().double().cpu() for k in keys]), device)
    return dict(zip(keys, total, strict=True))
