"""Training a sharded module: gradient accumulation, optimizer, state.

There is no Ray and no loss here: critic.py and policy.py pass in a loss per micro-batch.
Every rank calls every method in the same order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
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

from actors.training.background_save import BackgroundSaver
from actors.training.process_group import all_reduce
from dvpo_service.config import OptimConfig
from dvpo_service.models.whole import whole
from dvpo_service.runs.integrity import Files
from dvpo_service.runs.storage import read_locally
from dvpo_service.types import Metrics

log = logging.getLogger(__name__)


@dataclass
class StepReport:
    """What one call of ``Trainer.step`` did. A step with a non-finite loss or gradient is skipped."""

    loss: float
    grad_norm: float
    skipped: bool


class UpdateMetrics:
    """The metrics of an update: means over its optimizer steps, and the number of steps skipped.

    Args:
      pool: "policy" or "critic", the first part of the metrics' names.
      loss_name: the metric name of the loss.
    """

    def __init__(self, pool: str, loss_name: str):
        self.pool, self.loss_name = pool, loss_name
        self._sums: Metrics = {}
        self._steps = 0
        self._skipped = 0

    def add(self, report: StepReport, measured: Mapping[str, Tensor]) -> None:
        """Count one optimizer step, with what was ``measured`` in it over all ranks."""
        self._steps += 1
        self._skipped += report.skipped
        values = {name: float(value) for name, value in measured.items()}
        for name, value in (values | {self.loss_name: report.loss, "grad_norm": report.grad_norm}).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def result(self, lr: float) -> Metrics:
        """Return everything by name; ``lr`` is the learning rate now."""
        means = {f"{self.pool}/{name}": total / self._steps for name, total in self._sums.items()}
        return means | {f"{self.pool}/skipped_steps": float(self._skipped), f"{self.pool}/lr": lr}


class Trainer:
    """Optimizer steps on a sharded module, and its state in checkpoints.

    Args:
      module: sharded by ``models.sharding.shard``.
      config: of the optimizer (AdamW) and the learning rate schedule.
      total_steps: optimizer steps of the run, for the schedule.
      own_lrs: learning rates of submodules of ``module`` by name, in place of ``config.lr``, with the same schedule.
      defer_reduction: reduce gradients over the ranks once per optimizer step, not after every micro-batch. Each rank
        then keeps the gradient of the whole module in between, not of its own shard.

    Attributes:
      extra: further tensors to save with the state, the same on every rank.
    """

    def __init__(
        self,
        module: Any,
        config: OptimConfig,
        *,
        total_steps: int,
        own_lrs: Mapping[str, float] | None = None,
        defer_reduction: bool = False,
    ):
        self.module = module
        self.config = config
        self.defer_reduction = defer_reduction
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(module, own_lrs or {}),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" or None,  # None is the default, which on GPUs takes a copy of the shard
        )
        name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        self.schedule = get_scheduler(
            name, self.optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
        )
        # A parameter with several names (an output layer tied to the input embedding) is saved under the first of them.
        first: dict[int, str] = {}
        self._names = {k: first.setdefault(id(p), k) for k, p in module.named_parameters(remove_duplicate=False)}
        self.extra: dict[str, Tensor] = {}
        self._saver = BackgroundSaver()

    def step(self, losses: Iterable[Callable[[], Tensor]]) -> StepReport:
        """Accumulate the gradients of the micro-batches' losses and take one optimizer step. Collective.

        The step is skipped if the loss or the gradient is not finite.

        Args:
          losses: one function per micro-batch that computes its loss, a scalar. Each loss is already divided by the
            global token count, so the gradient of the step is the plain sum over micro-batches and ranks. FSDP averages
            over ranks; each loss is multiplied by the number of ranks to undo that.

        Returns:
          The loss, summed over micro-batches and ranks, and the gradient's norm before clipping.
        """
        world = dist.get_world_size()
        pending = list(losses)
        total = 0.0
        for i, compute in enumerate(pending):
            self._reduce_gradients(not self.defer_reduction or i == len(pending) - 1)
            loss = compute()
            (loss * world).backward()
            total += float(loss.detach())
        total = float(all_reduce(torch.tensor(total, dtype=torch.float64), self.device))
        grad_norm = float(clip_grad_norm(self.module.parameters(), self.config.max_grad_norm))
        finite = math.isfinite(total) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(total, grad_norm, skipped=not finite)

    @property
    def lr(self) -> float:
        """The learning rate now."""
        return self.schedule.get_last_lr()[0]

    @property
    def device(self) -> torch.device:
        """The device of the module's parameters."""
        return next(self.module.parameters()).device

    def _reduce_gradients(self, now: bool) -> None:
        """Let the next backward pass reduce its gradients over the ranks, or keep them."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(now)

    # State. Each rank writes its own sharded safetensors files (nothing is unpickled from disk), and they can be loaded
    # at any world size.

    def save(self, folder: str) -> None:
        """Start to write model, optimizer and schedule, as they are now, below ``folder``, a path or an fsspec URL.

        Collective. It returns before everything is written; ``saved`` tells when it is.
        """
        self._saver.start(self._tensors(*self._state()), folder)

    def saved(self, *, wait: bool) -> Files | None:
        """Return the files that this rank wrote with the last ``save``, or None while it still writes.

        Args:
          wait: wait until everything is written.

        Raises:
          OSError: the files could not be written.
        """
        return self._saver.outcome(wait=wait)

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote, at any world size. Collective.

        Extra tensors that an earlier version did not save keep their first values.
        """
        model, optim = self._state()
        tensors = self._tensors(model, optim)
        with read_locally(folder) as local:  # the reader memory-maps its files
            reader = HuggingFaceStorageReader(local)
            saved = reader.read_metadata().state_dict_metadata
            for name in [k for k in tensors if k.startswith("extra.") and k not in saved]:
                log.warning("%s is of an earlier version: %s starts anew", folder, name.removeprefix("extra."))
                del tensors[name]
            dcp.load(tensors, storage_reader=reader)
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict={k: tensors[f"model.{self._names.get(k, k)}"] for k in model},
            optim_state_dict={k: tensors.get(f"optim.{k}", v) for k, v in optim.items()},
            options=self._options,
        )
        self.extra = {k: tensors.get(f"extra.{k}", v) for k, v in self.extra.items()}
        self._set_schedule(int(tensors["schedule"]))

    def _set_schedule(self, steps_done: int) -> None:
        self.schedule.last_epoch = steps_done
        lrs = [base * f(steps_done) for base, f in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)]
        self.schedule._last_lr = lrs
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        model, optim = get_state_dict(self.module, self.optimizer, options=self._options)
        return dict(model), dict(optim)

    @property
    def _options(self) -> StateDictOptions:
        """Weights that are frozen are those of the base model, and no checkpoint has them."""
        frozen = not all(p.requires_grad for p in self.module.parameters())
        return StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=frozen, strict=not frozen)

    def _tensors(self, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors that change in training, by name. Hyper-parameters come from the config, not from here."""
        tensors = {f"model.{k}": v for k, v in model.items() if self._names.get(k, k) == k}
        tensors |= {f"optim.{k}": v for k, v in optim.items() if k.startswith("state.")}
        tensors |= {f"extra.{k}": v for k, v in self.extra.items()}
        tensors["schedule"] = torch.tensor(self.schedule.last_epoch)
        return tensors


def _parameter_groups(module: nn.Module, own_lrs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the submodules with a learning rate of their own, and everything else first."""
    own = {name: list(module.get_submodule(name).parameters()) for name in own_lrs}
    apart = {id(p) for parameters in own.values() for p in parameters}
    rest = {"params": [p for p in module.parameters() if p.requires_grad and id(p) not in apart]}
    return [rest, *({"params": own[name], "lr": lr} for name, lr in own_lrs.items())]


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their common norm is at most ``max_norm``; return their norm before. Collective.

    Unlike torch's ``clip_grad_norm_`` it takes parameters that are sharded over different device meshes.
    """
    meshes: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    if not meshes:
        return torch.zeros(())
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in meshes.values()]
    of_meshes = [whole(norm) for norm in norms]
    norm = of_meshes[0] if len(of_meshes) == 1 else torch.stack(of_meshes).norm()
    for group in meshes.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
