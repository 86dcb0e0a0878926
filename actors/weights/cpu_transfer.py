"""Weight transfer to a vLLM engine without GPUs, in vLLM's own framework.

vLLM ships ``nccl`` and ``ipc`` transfer, both for GPUs. This is the same for CPU: the
trainer writes its weights as one safetensors file without a name (memfd: memory that the
kernel takes back with the trainer, however that ends), the engine's worker on the same
machine maps it and loads it in place; an engine on another host gets the file's bytes first
(``EngineClient.update_weights``). ``register`` is a ``vllm.general_plugins`` entry
point, so vLLM runs it in every process of an engine before a model is built.

Why the plugin also turns off packed linear layers: on CPU vLLM hands each weight to
oneDNN (or an AMX kernel), which keeps a packed copy behind a handle that the compiled
graph holds as a constant. Loading new weights makes a new handle that the graph never
sees: the engine goes on with the old policy and says nothing. Without packing the graph
takes the weight itself as an argument, and an in-place copy is exact.
"""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
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

BACKEND = "safetensors"


def register() -> None:
    """Make the backend known, weights updatable, and a process end with its actor, leaving nothing. Idempotent."""
    from vllm.platforms import current_platform

    end_with_parent()
    expect_removed_names()
    if current_platform.is_cpu():
        _disable_packed_linear()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsEngine)
        WeightTransferTrainerFactory.register_engine(BACKEND, SafetensorsTrainerEngine)


def _disable_packed_linear() -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the file describes itself."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """``path``: a safetensors file with every parameter under its Hugging Face name."""

    path: str


@dataclass
class TrainerInit(TrainerInitInfo):
    """Nothing but what every backend has."""

    backend: ClassVar[str] = BACKEND


class SafetensorsEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Worker side: loads a file into the model's parameters, in place."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        packed = [name for name, p in self.model.named_parameters() if math.prod(p.shape) == 0]
        if packed:
            raise RuntimeError(
                f"{len(packed)} layers of the engine keep a packed copy of their weights "
                f"(first: {packed[0]}), so new weights would not reach them. "
                "Is the plugin dvpo_cpu_weight_transfer installed (pip install -e .)?"
            )

    def start_weight_update(self) -> None:
        """Nothing to prepare: parameters are written in place."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with safe_open(update_info.path, framework="pt") as file, torch.no_grad():
            loaded = self.model.load_weights(  # type: ignore[operator]
                (name, file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118 - no dict
            )
        missing = {name for name, _ in self.model.named_parameters()} - (loaded or set())
        if missing:
            raise RuntimeError(f"the update left {len(missing)} parameters unchanged: {sorted(missing)[:3]}")

    def update_weights(self, update_info: dict) -> None:
        # The base class synchronizes an accelerator, which a CPU build does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """Nothing to finish: see ``start_weight_update``."""

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class SafetensorsTrainerEngine(TrainerWeightTransferEngine[TrainerInit]):
    """Trainer side: rank 0 writes the file; every rank takes part in gathering shards."""

    init_info_cls = TrainerInit

    @classmethod
    def trainer_init(
        cls, init_info: TrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        if source is None:
            raise ValueError("the safetensors transfer needs a WeightSource")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            client.init_weight_transfer_engine({})
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.source}
        if not self.is_sender:
            return
        # A name that no other host has: an engine that finds it reads this very file.
        with os.fdopen(os.memfd_create(f"dvpo-weights-{uuid.uuid4().hex}"), "wb") as file:
            file.write(save(tensors))
            file.flush()
            self.client.start_weight_update()
            self.client.update_weights({"path": f"/proc/{os.getpid()}/fd/{file.fileno()}"})
            self.client.finish_weight_update()
