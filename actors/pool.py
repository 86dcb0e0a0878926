"""Actors that act as one: spawn, call all with a deadline, shut down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.fsdp import Rendezvous
from actors.placement import Placement
from actors.weight_transfer import free_port
from dvpo_service import stopping

log = logging.getLogger(__name__)

POLL_S = 0.25


class PoolError(RuntimeError):
    """An actor of a pool died, raised, or missed its deadline."""

    def __init__(self, pool: str, method: str, cause: str):
        super().__init__(f"pool {pool!r}, in {method}: {cause}. Its processes' logs: {_log_folder()}")
        self.pool, self.method, self.cause = pool, method, cause


def _log_folder() -> str:
    """Where this Ray session keeps what its actors print."""
    node = ray._private.worker._global_node
    return node.get_logs_dir_path() if node else "ray-session/logs"


def wait_for(refs: Any, timeout_s: float) -> Any:
    """``ray.get`` in short pieces, so that a request to stop can end it. Raises what ray.get does, and Stopped."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        try:
            return ray.get(refs, timeout=max(0.0, min(POLL_S, left)))
        except GetTimeoutError:
            stopping.check()
            if left <= POLL_S:
                raise


@dataclass
class Call:
    """A running call of one method on every actor of a pool."""

    pool: str
    method: str
    refs: list[Any]
    timeout_s: float

    def result(self) -> list[Any]:
        """Results in actor order. Raises PoolError."""
        try:
            return wait_for(self.refs, self.timeout_s)
        except GetTimeoutError as error:
            raise PoolError(self.pool, self.method, f"no answer within {self.timeout_s:g} s") from error
        except RayTaskError as error:
            raise PoolError(self.pool, self.method, f"{type(error.cause).__name__}: {error.cause}") from error
        except RayActorError as error:
            raise PoolError(self.pool, self.method, f"an actor died: {' '.join(str(error).split())[:400]}") from error


class Pool:
    """A fixed list of actors of one kind."""

    def __init__(self, name: str, actors: list[Any], *, timeout_s: float):
        self.name, self.actors, self.timeout_s = name, actors, timeout_s

    def submit(self, method: str, *args: Any, timeout_s: float | None = None) -> Call:
        """Start ``method(*args)`` on every actor."""
        refs = [getattr(a, method).remote(*args) for a in self.actors]
        return Call(self.name, method, refs, timeout_s or self.timeout_s)

    def call(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        return self.submit(method, *args, timeout_s=timeout_s).result()

    def shutdown(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


class Rank:
    """The Ray actor of a trainer rank: makes its worker once the ranks know where to meet."""

    def __init__(self) -> None:
        self.worker: Any = None

    def address(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()

    def setup(self, make: Callable[..., Any], *args: Any) -> None:
        self.worker = make(*args)

    def run(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)


class RankPool(Pool):
    """Trainer ranks that run every method in lockstep."""

    @classmethod
    def spawn(cls, name: str, world_size: int, placement: Placement, *, timeout_s: float) -> RankPool:
        actor = ray.remote(Rank)
        return cls(
            name,
            [actor.options(**placement.options(name, i)).remote() for i in range(world_size)],
            timeout_s=timeout_s,
        )

    def setup(self, make: Callable[..., Any], *args: Any) -> Call:
        """Start building ``make(*args, rendezvous)`` on every rank."""
        host, port = ray.get(self.actors[0].address.remote(), timeout=self.timeout_s)
        refs = [
            actor.setup.remote(make, *args, Rendezvous(rank, len(self.actors), host, port, self.timeout_s))
            for rank, actor in enumerate(self.actors)
        ]
        return Call(self.name, "setup", refs, self.timeout_s)

    def submit(self, method: str, *args: Any, timeout_s: float | None = None) -> Call:
        refs = [a.run.remote(method, *args) for a in self.actors]
        return Call(self.name, method, refs, timeout_s or self.timeout_s)
