"""Pools of trainer ranks that run every method together, and the batch that the two pools share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from actors.cluster.placement import Placement
from actors.cluster.pool import POLL_S, Call, Pool, Rendezvous, outcome
from actors.training.worker import TrainerWorker
from dvpo_service.errors import describe_error
from dvpo_service.host.network import free_port
from dvpo_service.runs.integrity import Files
from dvpo_service.types import Metrics, Rollouts


def rank_actor(worker: type) -> type:
    """Return a class for Ray actors with the worker's methods. ``setup`` builds the worker, not ``__init__``.

    Ranks must be running before they know where to meet, and the worker needs to know that.
    """

    class Rank(worker):
        def __init__(self) -> None:  # ``setup`` runs the worker's own
            pass

        def address(self) -> tuple[str, int]:
            return ray.util.get_node_ip_address(), free_port()

        def setup(self, *arguments: Any) -> None:
            super().__init__(*arguments)

    Rank.__qualname__ = Rank.__name__  # by which Ray lists the actors
    return Rank


class RankPool(Pool):
    """The ranks of one worker class; ``worker(*arguments, rendezvous)`` is built on each by ``setup``.

    Args:
      name: "policy" or "critic", as the placement calls it.
      worker: the class of a rank, ``CriticWorker`` or ``PolicyWorker``.
      arguments: of the worker, before the rendezvous.
      world_size: number of ranks.
      placement: the reserved bundles.
      timeout_s: default deadline of a call.
    """

    def __init__(
        self,
        name: str,
        worker: type,
        arguments: Sequence[Any],
        world_size: int,
        placement: Placement,
        *,
        timeout_s: float,
    ):
        self.worker, self.arguments = worker, arguments
        self.world_size, self.placement = world_size, placement
        super().__init__(name, self._spawn(name), timeout_s=timeout_s)

    def setup(self) -> Call:
        """Start building the worker on every rank."""
        host, port = Call(self.name, "address", [self.actors[0].address.remote()], self.timeout_s).result()[0]
        refs = [
            actor.setup.remote(*self.arguments, Rendezvous(rank, len(self.actors), host, port, self.timeout_s))
            for rank, actor in enumerate(self.actors)
        ]
        return Call(self.name, "setup", refs, self.timeout_s)

    def rebuild(self) -> Call:
        """End every rank and start to build new ones: same bundles, new processes, a new meeting place.

        Ranks that wait in a collective for a dead one are ended too.
        """
        self.shutdown()
        self.actors = self._spawn(self.name)
        return self.setup()

    def submit(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Call:
        """Start ``method``, one of the worker class's, on every rank. ``timeout_s`` overrides the pool's deadline."""
        refs = [getattr(actor, method.__name__).remote(*args) for actor in self.actors]
        return Call(self.name, method.__name__, refs, timeout_s or self.timeout_s)

    def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call ``method`` on every rank and return the results in the ranks' order. Raises as ``Call.result`` does."""
        return self.submit(method, *args, timeout_s=timeout_s).result()

    def gone(self) -> str | None:
        """Return why a rank is lost, or None. A busy rank has not answered yet, and is not waited for."""
        refs = [a.__ray_ready__.remote() for a in self.actors]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S)
        for ref in done:
            result = outcome(ref)
            if isinstance(result, RayActorError):
                return f"an actor died: {describe_error(result)}"
        return None

    def _spawn(self, name: str) -> list[Any]:
        actor: Any = ray.remote(rank_actor(self.worker))
        return [actor.options(**self.placement.options(name, i)).remote() for i in range(self.world_size)]


class SharedBatch:
    """Puts a step's batch into Ray's object store once for both pools; later stages send only changed fields."""

    def __init__(self) -> None:
        self._base: Rollouts | None = None
        self._ref: Any = None

    def share(self, rollouts: Rollouts) -> tuple[Any, dict[str, Tensor]]:
        """Return a reference to the stored batch, and the fields of ``rollouts`` that differ from it, by name."""
        if self._base is None or self._base.tokens is not rollouts.tokens:
            self._base, self._ref = rollouts, ray.put(rollouts)
        base = self._base
        values = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)}
        return self._ref, {name: value for name, value in values.items() if value is not getattr(base, name)}


@dataclass
class MetricsJob:
    """An update under way. Its metrics are over all ranks already, so the first rank's are returned."""

    call: Call

    def result(self) -> Metrics:
        """Wait for the end of the update and return its metrics. Raises as ``Call.result`` does."""
        return self.call.result()[0]


@dataclass
class RanksSave:
    """A ``roles.SaveJob`` of a pool. It asks the ranks with an ordinary call, which they answer between other calls."""

    ranks: RankPool
    started: Call

    def done(self) -> bool:
        """Return whether every rank has written its files."""
        self.started.result()
        return all(files is not None for files in self.ranks.call(TrainerWorker.saved, False))

    def result(self, timeout_s: float | None = None) -> Files:
        """Wait until every rank has written its files, and return them all."""
        self.started.result()
        written: Files = {}
        for files in self.ranks.call(TrainerWorker.saved, True, timeout_s=timeout_s):
            written |= files
        return written


def in_batch_order(rows: Tensor, parts: list[Tensor]) -> Tensor:
    """Return the rows in the batch's order, which undoes the split over ranks and micro-batches.

    Args:
      rows: [B] row numbers in the batch, of the parts' rows one after the other.
      parts: of the ranks, in rank order.
    """
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, rows, joined)
