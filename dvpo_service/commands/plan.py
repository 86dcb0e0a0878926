"""``dvpo plan``: whether a run fits its devices, without them, and which stage of a step takes longest."""

from __future__ import annotations

import os

import psutil
import torch
from rich.table import Table

from actors.cluster.placement import plan_bundles
from dvpo_service.capacity.plan import Capacity, gib
from dvpo_service.capacity.shape import adapter_parameters, model_shape
from dvpo_service.config import Config
from dvpo_service.errors import ConfigError
from dvpo_service.terminal.console import make_console

GPU_GIB = 80.0  # a data-centre GPU, where neither --gib nor a GPU of this machine says otherwise


def capacity_of(config: Config, gib: float | None = None) -> Capacity:
    """Return a run's needs beside what its devices have.

    Args:
      gib: memory of each GPU, or of the host where the run has none; None takes that of this machine.

    Raises:
      CheckpointError: the model's config cannot be read.
    """
    capacity = Capacity(config, model_shape(config), gib or 0.0)
    if gib:
        return capacity
    return Capacity(config, capacity.shape, _host_gib() if capacity.on_cpu else _gpu_gib())


def check_capacity(config: Config) -> str:
    """Check that the run fits this machine's memory; return what was found, in words.

    The GPUs of a cluster elsewhere are not known before the actors start, so nothing is checked for one.

    Raises:
      ConfigError: it does not fit.
      CheckpointError: the model's config cannot be read.
    """
    on_gpus = config.cluster.gpus_per_trainer > 0 or config.cluster.gpus_per_engine > 0
    if config.cluster.address or "RAY_ADDRESS" in os.environ or (on_gpus and not torch.cuda.is_available()):
        return "not checked: the devices are elsewhere; `dvpo plan --gib` does"
    capacity = capacity_of(config)
    capacity.check()
    return ", ".join(f"{d.count} {d.pool} of {gib(d.size)}" for d in capacity.devices)


def check_adapters(config: Config) -> None:
    """Raise ConfigError where ``policy.lora`` or ``critic.lora`` names layers that the model lacks."""
    for name, pool in (("policy", config.policy), ("critic", config.critic)):
        try:
            adapter_parameters(config, pool.lora, head=name == "policy")
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from error


def show(config: Config, gpus: int | None, gib: float | None) -> None:
    """Print the plan of a run.

    Args:
      gpus: number of GPUs that there will be; None does not compare.
      gib: see ``capacity_of``.

    Raises:
      ConfigError: the run does not fit.
    """
    capacity = capacity_of(config, gib)
    console = make_console()
    for table in (_memory(capacity), _arithmetic(capacity)):
        console.print(table)
    capacity.check()
    needed = sum(b.resources.get("GPU", 0) for b in plan_bundles(config))
    if gpus is not None and needed > gpus:
        raise ConfigError(
            f"the plan does not fit: its actors need {needed:g} GPUs and there are {gpus}; lower policy.world_size, "
            "critic.world_size or rollout.num_engines, or cluster.gpus_per_trainer and gpus_per_engine"
        )
    console.print("[green]fits[/]")


def _memory(capacity: Capacity) -> Table:
    table = Table(title=f"{capacity.config.name}: memory of each actor", title_justify="left")
    for column in ("actors", "part", "size"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for device in capacity.devices:
        for i, part in enumerate(device.parts):
            table.add_row(f"{device.count} {device.pool}" if i == 0 else "", part.name, gib(part.size))
        table.add_row("", "[bold]all[/]", f"[bold]{gib(device.size)}[/] of {gib(capacity.room(device))}")
        table.add_section()
    for i, (name, size) in enumerate(capacity.host.items()):
        table.add_row("host memory" if i == 0 else "", name, gib(size))
    return table


def _arithmetic(capacity: Capacity) -> Table:
    table = Table(title="a step", title_justify="left", show_header=False)
    shape, tokens = capacity.shape, capacity.tokens()
    limit = capacity.longest_response()
    rows = {
        "model": f"{shape.parameters:,} parameters, {shape.layers} layers of width {shape.hidden}",
        "tokens at most": f"{tokens['prompts']:,} of prompts, {tokens['responses']:,} of responses",
        "longest response that fits": f"{limit:,} tokens" if limit else "none",
    }
    if not capacity.config.cluster.in_process:
        rows["sequences at once"] = f"{capacity.sequences_at_once():,.0f} of full length in an engine's KV cache"
    if not capacity.on_cpu:
        seconds = capacity.stage_seconds()
        total = sum(seconds.values())
        shares = sorted(seconds.items(), key=lambda item: -item[1])
        rows["time by stage, roughly"] = ", ".join(f"{name} {s / total:.0%}" for name, s in shares)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _host_gib() -> float:
    return psutil.virtual_memory().total / 2**30


def _gpu_gib() -> float:
    if not torch.cuda.is_available():
        return GPU_GIB
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
