"""Trainer ranks that run every method in lockstep, and what the policy's and the critic's pools share."""

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
from dvpo_service.errors import describe_error
from dvpo_service.host.network import free_port
from dvpo_service.runs.integrity import Files
from dvpo_service.types import Metrics, Rollouts


def rank_actor(worker: type) -> type:
    """Return the Ray actor class of a worker: the same methods, but built only once the ranks know where to meet."""

    class Rank(worker):
        def __init__(self) -> None:  # the worker's own runs in ``setup``
            pass

        def address(self) -> tuple[str, int]:
            return ray.util.get_node_ip_address(), free_port()

        def setup(self, *arguments: Any) -> None:
            super().__init__(*arguments)

    return Rank


class RankPool(Pool):
    """The ranks of one worker class; ``worker(*arguments, rendezvous)`` is built on each by ``setup``.

    Args:
      name: "policy" or "critic", as the placement calls it.
      timeout_s: deadline of a call.
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
        """End every rank, also those that wait in a collective for a dead one, and start building them anew: same
        bundles, new processes, a new meeting place."""
        self.shutdown()
        self.actors = self._spawn(self.name)
        return self.setup()

    def submit(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Call:
        """Start ``method``, one of the worker class, on every rank."""
        refs = [getattr(actor, method.__name__).remote(*args) for actor in self.actors]
        return Call(self.name, method.__name__, refs, timeout_s or self.timeout_s)

    def call(self, method: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Return the results of ``method`` in the ranks' order. Raises what ``Call.result`` does."""
        return self.submit(method, *args, timeout_s=timeout_s).result()

    def gone(self) -> str | None:
        """Return why ranks are lost, if any is. One that is busy has no answer yet, and is not waited for."""
        refs = [a.__ray_ready__.remote() for a in self.actors]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S)
        outcomes = (outcome(ref) for ref in done)
        return next((f"an actor died: {describe_error(o)}" for o in outcomes if isinstance(o, RayActorError)), None)

    def _spawn(self, name: str) -> list[Any]:
        actor: Any = ray.remote(rank_actor(self.worker))
        return [actor.options(**self.placement.options(name, i)).remote() for i in range(self.world_size)]


class SharedBatch:
    """A step's batch in Ray's object store, once, however many pools read it; later stages send what changed since."""

    def __init__(self) -> None:
        self._base: Rollouts | None = None
        self._ref: Any = None

    def share(self, rollouts: Rollouts) -> tuple[Any, dict[str, Tensor]]:
        """Return a reference to the step's batch, and the tensors of ``rollouts`` that are not those in it."""
        if self._base is None or self._base.tokens is not rollouts.tokens:
            self._base, self._ref = rollouts, ray.put(rollouts)
        base = self._base
        changes = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)}
        return self._ref, {name: value for name, value in changes.items() if value is not getattr(base, name)}


@dataclass
class MetricsJob:
    """An update under way; its metrics are global sums already, so any rank's will do."""

    call: Call

    def result(self) -> Metrics:
        return self.call.result()[0]


@dataclass
class RanksSave:
    """A ``roles.SaveJob`` of a pool. Asking is a call like any other: the ranks answer between two of them."""

    ranks: RankPool
    started: Call

    def done(self) -> bool:
        self.started.result()
        return all(files is not None for files in self.ranks.call(self.ranks.worker.saved, False))  # type: ignore[attr-defined]

    def result(self, timeout_s: float | None = None) -> Files:
        self.started.result()
        written: Files = {}
        for files in self.ranks.call(self.ranks.worker.saved, True, timeout_s=timeout_s):  # type: ignore[attr-defined]
            written |= files
        return written


def in_batch_order(rows: Tensor, parts: list[Tensor]) -> Tensor:
    """Undo the split over ranks and micro-batches: ``parts`` concatenated are the batch's rows ``rows``."""
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, rows, joined)
