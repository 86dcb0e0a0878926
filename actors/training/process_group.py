"""The process group of a pool's ranks, and reductions over it."""

from __future__ import annotations

import datetime
import errno

import torch
import torch.distributed as dist
from torch import Tensor

from actors.cluster.pool import Rendezvous
from dvpo_service.host.network import listen, own_address, use_interface_of


def init_process_group(meet: Rendezvous) -> torch.device:
    """Join the pool's process group (NCCL with a GPU, gloo without) and return this rank's device. Collective.

    Policy and critic share the group where they are in one process, each the only rank of its pool.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if meet.world_size == 1 and dist.is_initialized():
        return device
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
    """Return the ranks' TCP store, which listens on its own address only.

    By default torch listens on all interfaces, and the store has no authentication.
    """
    descriptor = None
    if meet.rank == 0:
        try:
            descriptor = listen(meet.address, meet.port, shared=False).detach()
        except OSError as error:
            # A translated (NAT) address is on no interface of this host. Then torch listens where it chooses.
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


def all_reduce(value: Tensor, device: torch.device) -> Tensor:
    """Return the sum of ``value`` over the pool's ranks, on the CPU. Collective."""
    value = value.to(device)
    dist.all_reduce(value)
    return value.cpu()


def all_reduce_min(value: Tensor, device: torch.device) -> Tensor:
    """Return the elementwise minimum of ``value`` over the pool's ranks, on the CPU. Collective."""
    value = value.to(device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value.cpu()


def add_up(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add ``more`` to the running ``sums`` by name, in place; sums are float64 on the CPU."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value.detach().double().cpu()


def all_reduce_sums(sums: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the sums of scalars over the ranks, in one collective call. Every rank has the same keys."""
    keys = sorted(sums)
    total = all_reduce(torch.stack([sums[k].detach().double().cpu() for k in keys]), device)
    return dict(zip(keys, total, strict=True))
