"""The trainer's side of vLLM's weight transfer, for CPU and GPU backends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch import nn

from actors.cluster.pool import EngineLost
from actors.rollouts.engine import VllmEngine
from dvpo_service.config import Backend, Config
from dvpo_service.errors import ConfigError, one_line
from dvpo_service.host.network import free_port
from dvpo_service.registry import engines


def weight_backend(config: Config) -> Backend:
    """Return the configured backend. ``auto`` is NCCL where engines have GPUs and support it, else a file in memory.

    Raises:
      ConfigError: the engine does not support the configured backend.
    """
    transfers = engines.load(config.rollout.engine).transfers
    wanted = config.rollout.weight_transfer
    if wanted == "auto":
        return "nccl" if config.cluster.gpus_per_engine > 0 and "nccl" in transfers else "safetensors"
    if wanted not in transfers:
        raise ConfigError(
            f"rollout.weight_transfer={wanted}: rollout.engine={config.rollout.engine} takes {', '.join(transfers)}"
        )
    return wanted


class EngineClient:
    """vLLM's weight-sync control plane over rollout actors, with one deadline for all calls of a push.

    Every method is called on all engines at once. An engine that dies, fails in an update or misses the deadline is
    recorded in ``lost`` with the cause, and is left out of the calls that follow; the update of the others goes on.

    Args:
      engines: actors by their number in the pool.
      workers_per_engine: the engines' tensor-parallel size. NCCL ranks are numbered through all engines' workers.
      timeout_s: from the first call to the last.
    """

    def __init__(self, engines: dict[int, Any], workers_per_engine: int, timeout_s: float):
        self.engines, self.workers_per_engine, self.timeout_s = engines, workers_per_engine, timeout_s
        self.lost: dict[int, str] = {}
        self._deadline: float | None = None  # of the process that makes the calls

    @property
    def membership(self) -> tuple[Any, ...]:
        """A value that is equal for clients of the same actors."""
        return tuple((i, actor._actor_id) for i, actor in sorted(self.engines.items()))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join every engine to the transfer; each one gets its own ``rank_offset`` where the backend has ranks."""
        infos = {i: dict(init_info) for i in self.engines}
        if "rank_offset" in init_info:
            for position, info in enumerate(infos.values()):
                info["rank_offset"] += position * self.workers_per_engine
        self._all(VllmEngine.init_weight_transfer_engine, {i: (info,) for i, info in infos.items()})

    def shutdown_weight_transfer_engine(self) -> None:
        """Have every engine leave the transfer."""
        self._all(VllmEngine.shutdown_weight_transfer_engine)

    def start_weight_update(self) -> None:
        """Have every engine expect an update."""
        self._all(VllmEngine.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        """Have every engine load the update. Engines on this host read a file directly; others are sent its bytes."""
        arguments: dict[int, tuple[Any, ...]] = dict.fromkeys(self.engines, (update_info,))
        if isinstance(update_info, dict) and "path" in update_info:
            remote = [i for i, sees_file in self.reading(update_info["path"]).items() if not sees_file]
            if remote:  # the bytes go into Ray's object store once for all of them
                content = ray.put(np.fromfile(update_info["path"], dtype=np.uint8))
                arguments |= dict.fromkeys(remote, (update_info, content))
        self._all(VllmEngine.update_weights, arguments)

    def reading(self, path: str) -> dict[int, bool]:
        """Return, by engine, whether it sees this host's file at ``path``."""
        return self._all(VllmEngine.sees, dict.fromkeys(self.engines, (path, os.readlink(path))))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Tell every engine that the update is complete."""
        self._all(VllmEngine.finish_weight_update)

    def _all(self, method: Callable[..., Any], arguments: dict[int, tuple[Any, ...]] | None = None) -> dict[int, Any]:
        """Call ``method`` on every engine that is not lost; return the results of those that answered, by engine."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.timeout_s
        results = {}
        name = method.__name__
        refs = {
            i: getattr(actor, name).remote(*(arguments[i] if arguments else ()))
            for i, actor in self.engines.items()
            if i not in self.lost
        }
        for i, ref in refs.items():
            try:
                results[i] = ray.get(ref, timeout=max(0.0, self._deadline - time.monotonic()))
            except GetTimeoutError:
                self.lost[i] = f"no answer to {name} within {self.timeout_s:g} s of the push's beginning"
            except RayActorError as error:
                self.lost[i] = f"its process is gone, in {name}: {type(error).__name__}"
            except RayTaskError as error:
                # An engine that cannot join would not join after a restart either. One that failed in an update has
                # half of the weights, and vLLM's own record of the update is not to be trusted.
                if method is VllmEngine.init_weight_transfer_engine and not isinstance(error.cause, EngineLost):
                    raise
                self.lost[i] = f"{one_line(error.cause)}, in {name}"
        return results


def connect(module: nn.Module, client: EngineClient, backend: Backend, rank: int, dtype: torch.dtype) -> Any:
    """Join the weight transfer between the policy's ranks and the engines. Collective.

    Args:
      module: the policy's model, whose parameters are sent.
      client: the engines.
      backend: how the weights travel.
      rank: of this process in the policy's pool.
      dtype: what the engines compute in; the weights travel in it.

    Returns:
      A vLLM ``TrainerWeightTransferEngine``.
    """
    # vLLM takes seconds to import; code that only names a backend or a client need not wait for that.
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    from actors.weights import cpu_transfer
    from actors.weights.source import CheckpointSource

    cpu_transfer.register()
    if rank == 0:
        client.shutdown_weight_transfer_engine()  # the engines leave the group that they joined before
    return WeightTransferTrainerFactory.trainer_init(
        _init_info(backend, rank, client), client=client, source=CheckpointSource(module, dtype)
    )


def _init_info(backend: Backend, rank: int, client: EngineClient) -> Any:
    if backend == "safetensors":
        from actors.weights import cpu_transfer

        return cpu_transfer.TrainerInit(rank=rank)
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
