"""Ranks of a gloo process group as processes that start soon: the heavy imports are done once, and then forked."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# Importing these takes ten seconds. The fork server does it once for each of pytest's own processes; it runs nothing
# else, so that what it forks has no threads and no locks of anybody's.
HEAVY = ["torch", "transformers", "ray", "actors.training.critic", "actors.training.policy"]


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Run ``function(rank, *arguments)`` in ``world`` processes. Raises when one of them fails."""
    multiprocessing.set_forkserver_preload(HEAVY)
    mp.start_processes(_run, (dict(os.environ), function, arguments), nprocs=world, start_method="forkserver")


def _run(rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)  # the fork server has what was set when it started
    function(rank, *arguments)
