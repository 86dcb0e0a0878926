"""Joining a trainer rank to vLLM's weight transfer: one call for CPU and GPU backends."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
from torch import nn

from actors import cpu_weight_transfer
from actors.rollout import SHARED_MEMORY
from dvpo_service.config import Config

Backend = Literal["safetensors", "nccl", "ipc"]


def weight_backend(config: Config) -> Backend:
    """The configured backend; ``auto`` is NCCL between GPUs and a file in memory without."""
    if config.rollout.weight_transfer != "auto":
        return config.rollout.weight_transfer
    return "nccl" if config.cluster.gpus_per_engine > 0 else "safetensors"


@dataclass
class EngineClient:
    """vLLM's weight-sync control plane over rollout actors, with a deadline on every call.

    ``workers_per_engine`` is the engines' tensor-parallel size: NCCL ranks are numbered through
    all engines' workers.
    """

    engines: list[Any]
    workers_per_engine: int
    timeout_s: float

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.engines]
        if "rank_offset" in init_info:
            for i, info in enumerate(infos):
                info["rank_offset"] += i * self.workers_per_engine
        self._wait([e.init_weight_transfer_engine.remote(i) for e, i in zip(self.engines, infos, strict=True)])

    def shutdown_weight_transfer_engine(self) -> None:
        self._wait([e.shutdown_weight_transfer_engine.remote() for e in self.engines])

    def start_weight_update(self) -> None:
        self._wait([e.start_weight_update.remote() for e in self.engines])

    def update_weights(self, update_info: Any) -> None:
        """Every engine takes the update. A file is read where it lies, and sent to engines on other hosts."""
        near, content = [True] * len(self.engines), None
        if isinstance(update_info, dict) and "path" in update_info:
            near = self.reading(update_info["path"])
            if not all(near):  # into Ray's object store once, for all of them
                content = ray.put(np.fromfile(update_info["path"], dtype=np.uint8))
        sent = [None if n else content for n in near]
        self._wait([e.update_weights.remote(update_info, c) for e, c in zip(self.engines, sent, strict=True)])

    def reading(self, path: str) -> list[bool]:
        """By engine: does it see this host's file?"""
        return self._wait([e.sees.remote(path) for e in self.engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait([e.finish_weight_update.remote() for e in self.engines])

    def _wait(self, refs: list[Any]) -> list[Any]:
        return ray.get(refs, timeout=self.timeout_s)


def connect(module: nn.Module, client: EngineClient, backend: Backend, rank: int) -> Any:
    """A vLLM ``TrainerWeightTransferEngine`` over ``module``'s parameters. Collective."""
    from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory

    cpu_weight_transfer.register()
    return WeightTransferTrainerFactory.trainer_init(
        _init_info(backend, rank, client), client=client, source=ModuleSource(module)
    )


def _init_info(backend: Backend, rank: int, client: EngineClient) -> Any:
    if backend == "safetensors":
        return cpu_weight_transfer.TrainerInit(rank=rank, folder=SHARED_MEMORY)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        rank=rank,
        master_address=ray.util.get_node_ip_address(),
        master_port=free_port() if rank == 0 else 0,
        world_size=1 + len(client.engines) * client.workers_per_engine,
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
