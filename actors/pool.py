"""Actors that act as one: spawn, call all with a deadline, restart, shut down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from torch.distributed.checkpoint import CheckpointException

from actors.fsdp import Rendezvous
from actors.placement import Placement
from actors.weight_transfer import free_port
from dvpo_service import stopping
from dvpo_service.errors import UserError

log = logging.getLogger(__name__)

POLL_S = 0.25
# How long the other ranks' fates may take to show after one rank failed.
_PEER_GRACE_S = 5.0


class PoolError(RuntimeError):
    """An actor of a pool died, raised, or missed its deadline.

    ``lost``: the actors are gone or hang, so that fresh ones may do better; otherwise the call itself
    failed, and would again.
    """

    def __init__(self, pool: str, method: str, cause: str, *, lost: bool = False):
        super().__init__(f"pool {pool!r}, in {method}: {cause}. Its processes' logs: {_log_folder()}")
        self.pool, self.method, self.cause, self.lost = pool, method, cause, lost


class RestartsSpent(PoolError, UserError):
    """A pool's actors died more often than ``cluster.max_restarts`` allows."""

    def __init__(self, pool: str, cause: str, restarts: int):
        super().__init__(pool, "restart", cause)
        self.restarts = restarts
        self.resume = "give the same command again"

    def __str__(self) -> str:
        return (
            f"pool {self.pool!r} used its {self.restarts} restarts (cluster.max_restarts); the last cause: "
            f"{self.cause}. Look into {_log_folder()}; to continue from the last checkpoint: {self.resume}"
        )


def _log_folder() -> str:
    """Where this Ray session keeps what its actors print."""
    node = ray._private.worker._global_node
    return node.get_logs_dir_path() if node else "ray-session/logs"


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's kind and message, short."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}" if text else type(error).__name__


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
        """Results in actor order. Raises PoolError, or the OSError that an actor met (a full disk)."""
        try:
            return wait_for(self.refs, self.timeout_s)
        except GetTimeoutError as error:
            raise self._error(f"no answer within {self.timeout_s:g} s", lost=True) from error
        except RayActorError as error:
            raise self._error(f"an actor died: {one_line(error)}", lost=True) from error
        except RayTaskError as error:
            if refused := of_storage(error.cause):
                raise refused from error
            raise self._error(one_line(error.cause), lost=_of_hardware(error.cause) or self._lost_a_peer()) from error
        except RayError as error:  # an object or a node was lost on the way
            raise self._error(one_line(error), lost=True) from error

    def finished(self, within_s: float) -> bool:
        """Whether ``result`` would return or raise at once; waits for that, ``within_s`` at most."""
        done, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=within_s)
        return len(done) == len(self.refs) or any(isinstance(outcome(ref), RayError) for ref in done)

    def _error(self, cause: str, *, lost: bool) -> PoolError:
        return PoolError(self.pool, self.method, cause, lost=lost)

    def _lost_a_peer(self) -> bool:
        """Whether an actor died: the others may have failed for that alone, and have been heard first."""
        done, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=_PEER_GRACE_S)
        return any(isinstance(outcome(ref), RayActorError) for ref in done)


def of_storage(cause: BaseException) -> OSError | None:
    """The OSError that a call met, also where torch's distributed checkpoint tells it for all ranks together."""
    met = [cause]
    if isinstance(cause, CheckpointException):
        met = [error for error, _ in cause.failures.values()]
    return next((error for error in met if isinstance(error, OSError)), None)


def _of_hardware(cause: BaseException) -> bool:
    """A lost connection or a device's fault, not a mistake in the code."""
    return isinstance(cause, torch.distributed.DistError | torch.AcceleratorError)


def outcome(ref: Any) -> Any:
    """The value of a finished call, or its RayError."""
    try:
        return ray.get(ref, timeout=_PEER_GRACE_S)
    except RayError as error:
        return error


class Pool:
    """A list of actors of one kind."""

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

    def __init__(self, name: str, world_size: int, placement: Placement, *, timeout_s: float):
        self.world_size, self.placement = world_size, placement
        self.made_of: Sequence[Any] = ()
        super().__init__(name, self._spawn(name), timeout_s=timeout_s)

    def setup(self, make: Callable[..., Any], *args: Any) -> Call:
        """Start building ``make(*args, rendezvous)`` on every rank."""
        self.made_of = (make, *args)
        host, port = Call(self.name, "address", [self.actors[0].address.remote()], self.timeout_s).result()[0]
        refs = [
            actor.setup.remote(*self.made_of, Rendezvous(rank, len(self.actors), host, port, self.timeout_s))
            for rank, actor in enumerate(self.actors)
        ]
        return Call(self.name, "setup", refs, self.timeout_s)

    def rebuild(self) -> Call:
        """End every rank, also those that wait in a collective for a dead one, and start building anew
        what ``setup`` was given: same bundles, new processes, a new meeting place."""
        self.shutdown()
        self.actors = self._spawn(self.name)
        return self.setup(*self.made_of)

    def gone(self) -> str | None:
        """Why ranks are lost, if any is. One that is busy has no answer yet, and is not waited for."""
        refs = [a.__ray_ready__.remote() for a in self.actors]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=POLL_S)
        found = (outcome(ref) for ref in done)
        return next((f"an actor died: {one_line(f)}" for f in found if isinstance(f, RayActorError)), None)

    def submit(self, method: str, *args: Any, timeout_s: float | None = None) -> Call:
        refs = [a.run.remote(method, *args) for a in self.actors]
        return Call(self.name, method, refs, timeout_s or self.timeout_s)

    def _spawn(self, name: str) -> list[Any]:
        actor = ray.remote(Rank)
        return [actor.options(**self.placement.options(name, i)).remote() for i in range(self.world_size)]
