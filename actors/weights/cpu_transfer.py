"""Weight transfer to a vLLM engine without GPUs, in vLLM's own framework.

vLLM ships the transfers ``nccl`` and ``ipc``, both for GPUs. This module adds ``safetensors`` for CPUs. The trainer
writes its weights as safetensors files of bounded size, one after another, into a memfd, a file in memory without a
name, which the kernel frees when the trainer ends in whatever way. The engine's workers on the same machine map the
file and load it in place. An engine on another host gets the file's bytes first (``EngineClient.update_weights``).
``register`` is a ``vllm.general_plugins`` entry point, so vLLM runs it in every process of an engine before a model is
built.

The plugin also turns off packed linear layers, and has the packed weights of experts renewed after an update
(``cpu_experts``). On a CPU vLLM hands each weight to oneDNN (or an AMX kernel), which
keeps a packed copy behind a handle, and the compiled graph holds that handle as a constant. Loading new weights makes a
new handle that the graph never sees, so the engine would go on with the old policy without an error. Without packing
the graph takes the weight itself as an argument, and an in-place copy is exact.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from actors.cluster.process import end_with_parent
from actors.cluster.shm_cleanup import expect_removed_names
from actors.weights import cpu_experts
from dvpo_service.models.weight_files import TRANSFER_BYTES

BACKEND = "safetensors"


def register() -> None:
    """Prepare a vLLM process for this transfer. Idempotent.

    It registers the backend, makes weights updatable on a CPU, and has the process end with its actor without leaving
    shared memory behind.
    """
    from vllm.platforms import current_platform

    end_with_parent()
    expect_removed_names()
    if current_platform.is_cpu():
        _disable_packed_weights()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsEngine)
        WeightTransferTrainerFactory.register_engine(BACKEND, SafetensorsTrainerEngine)


def _disable_packed_weights() -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False
    cpu_experts.keep_unpacked()


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Empty: the file describes itself, so trainer and engine have nothing to agree on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """``path``: a safetensors file with some parameters under their Hugging Face names; ``last``: no more follow."""

    path: str
    last: bool = True


@dataclass
class TrainerInit(TrainerInitInfo):
    """The trainer's settings; this backend adds none of its own."""

    backend: ClassVar[str] = BACKEND


class SafetensorsEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The engine's side, in each vLLM worker: loads a file into the model's parameters, in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Raise RuntimeError if a layer keeps a packed copy of its weights, which an update would not reach."""
        packed = [name for name, p in self.model.named_parameters() if math.prod(p.shape) == 0]
        packed += cpu_experts.not_updatable(self.model)
        if packed:
            raise RuntimeError(
                f"{len(packed)} layers of the engine keep a packed copy of their weights "
                f"(first: {packed[0]}), so new weights would not reach them. "
                "Is the plugin dvpo_cpu_weight_transfer installed (pip install -e .)?"
            )

    def start_weight_update(self) -> None:
        """Expect a whole update: parameters are written in place."""
        self.missing = {name for name, _ in self.model.named_parameters()}

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load the file at ``update_info.path``. Raises RuntimeError if the update leaves a parameter unchanged."""
        with safe_open(update_info.path, framework="pt") as file, torch.no_grad():
            loaded = self.model.load_weights(  # type: ignore[operator]
                (name, file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118 - ``file`` is no dict
            )
        self.missing -= loaded or set()
        if not update_info.last:
            return
        with torch.no_grad():
            cpu_experts.repack(self.model)
        if self.missing:
            raise RuntimeError(f"the update left {len(self.missing)} parameters unchanged: {sorted(self.missing)[:3]}")

    def update_weights(self, update_info: dict) -> None:
        """Parse ``update_info`` and load the weights."""
        # The base class synchronizes an accelerator, which a CPU build does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """Do nothing: see ``start_weight_update``."""

    def shutdown(self) -> None:
        """Do nothing: nothing is held between updates."""


class SafetensorsTrainerEngine(TrainerWeightTransferEngine[TrainerInit]):
    """The trainer's side: rank 0 writes the file, and every rank takes part in gathering the shards."""

    init_info_cls = TrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: TrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Return a trainer's end of the transfer. On rank 0 it also prepares the engines.

        Raises:
          ValueError: there is no ``source``.
        """
        if source is None:
            raise ValueError("the safetensors transfer needs a WeightSource")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            client.init_weight_transfer_engine({})
        return engine

    def send_weights(self) -> None:
        """Gather the weights, a file's at a time; on rank 0 have every engine load them. Collective."""
        assert self.source is not None
        left = len(self.source.metadata())
        if self.is_sender:
            self.client.start_weight_update()
        for tensors in parts(self.source, TRANSFER_BYTES):
            left -= len(tensors)
            if self.is_sender:
                self._send(tensors, last=left == 0)
        if self.is_sender:
            self.client.finish_weight_update()

    def _send(self, tensors: dict[str, Tensor], *, last: bool) -> None:
        # The memfd's name is on no other host, so an engine that sees it reads this file (``VllmEngine.sees``).
        with os.fdopen(os.memfd_create(f"dvpo-weights-{uuid.uuid4().hex}"), "wb") as file:
            file.write(save(tensors))
            file.flush()
            self.client.update_weights({"path": f"/proc/{os.getpid()}/fd/{file.fileno()}", "last": last})


def parts(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield weights by name in groups of up to ``size`` bytes; a larger one is a group of its own."""
    group: dict[str, Tensor] = {}
    held = 0
    for name, tensor in weights:
        if group and held + tensor.nbytes > size:
            yield group
            group, held = {}, 0
        group[name] = tensor
        held += tensor.nbytes
    if group:
        yield group
