"""``dvpo doctor``: check that this machine is ready and that the run fits, before money is spent on it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dvpo_service.config import Config
from dvpo_service.errors import UserError

if TYPE_CHECKING:
    from dvpo_service.data.dataset import Dataset

MIN_MEMORY_GIB = 8
MIN_DISK_GIB = 2
PACKAGES = ("torch", "ray", "transformers", "mlflow")


@dataclass(frozen=True)
class Finding:
    """One row of the table: whether the check passed, what was checked, and what was found."""

    ok: bool
    what: str
    found: str


def examine(config: Config | None) -> bool:
    """Check the machine, and the config if one is given. Print a table of the findings.

    Returns:
      True if every check passed, so that a run can start.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_machine, _packages, _vllm]
    if config is not None:
        checks += [lambda: _plugins(config), lambda: _data(config), lambda: _model(config), lambda: _plan(config)]
    table = Table(title="dvpo doctor")
    all_ok = True
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        for finding in _guarded(check):
            all_ok &= finding.ok
            table.add_row("[green]ok[/]" if finding.ok else "[bold red]no[/]", finding.what, finding.found)
    Console().print(table)
    return all_ok


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. A UserError becomes a finding, so that the other checks still run."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(False, type(error).__name__.removesuffix("Error").lower(), str(error))


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding((3, 11) <= sys.version_info[:2] < (3, 14), "Python 3.11 to 3.13", version)
    yield Finding(True, "cores", str(os.cpu_count()))
    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    yield Finding(
        free >= MIN_MEMORY_GIB, f"{MIN_MEMORY_GIB} GiB memory free", f"{free:.0f} of {memory.total / 2**30:.0f} GiB"
    )
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding(disk >= MIN_DISK_GIB, f"{MIN_DISK_GIB} GiB disk free here", f"{disk:.0f} GiB")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(True, "GPUs", ", ".join(gpus) or "none: runs on CPU")


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        yield Finding(True, name, importlib.metadata.version(name))


def _vllm() -> Iterator[Finding]:
    """Import vLLM in a process of its own: a broken build can take the interpreter down with it."""
    code = "import vllm; from vllm.v1.engine.async_llm import AsyncLLM; print(vllm.__version__)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        yield Finding(False, "vLLM imports", "no answer within 180 s")
        return
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:] or [""]
    yield Finding(done.returncode == 0, "vLLM imports", last[0])
    plugins = {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
    registered = "dvpo_cpu_weight_transfer" in plugins
    yield Finding(registered, "weight transfer on CPU", "registered" if registered else "missing: pip install -e .")


def _plugins(config: Config) -> Iterator[Finding]:
    from dvpo_service.commands.check_plugins import check_plugins

    check_plugins(config)
    yield Finding(True, "estimator, loss, engine", "load; estimator and loss return what they should")


def _data(config: Config) -> Iterator[Finding]:
    from dvpo_service.commands.check_rollouts import check_rollouts
    from dvpo_service.data.splits import load_data

    data = load_data(config.data)
    yield Finding(True, "training data", _size(data.train))
    for name, split in data.held_out.items():
        yield Finding(True, f"held-out data {name!r}", _size(split))
    check_rollouts(config, data)
    yield Finding(True, "reward", f"{config.reward.words} scores the answer of the first training row")


def _size(data: Dataset) -> str:
    return f"{len(data)} prompts" + (f"; {data.left_out}" if data.left_out else "")


def _model(config: Config) -> Iterator[Finding]:
    from dvpo_service.models.load import check_model, check_model_folder

    if config.model.path is None:
        yield Finding(True, "model", "made by a warm start")
        return
    check_model_folder(config.model.path)
    there = Path(config.model.path).exists()
    if there:
        check_model(config.model.path, config.max_model_len, trust_remote_code=config.model.trust_remote_code)
    where = "folder" if there else "hub name, fetched when the run starts"
    yield Finding(True, "model", f"{config.model.path} ({where})")


def _plan(config: Config) -> Iterator[Finding]:
    from actors.cluster.connect import plan_fit
    from dvpo_service.commands.plan import check_capacity

    yield Finding(True, "plan fits", plan_fit(config))
    yield Finding(True, "memory of each actor", check_capacity(config))
