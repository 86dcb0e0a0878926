"""What every pool of actors shares: calls with a deadline, the errors of failed calls, and the actors' end."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from torch.distributed.checkpoint import CheckpointException

from dvpo_service.errors import UserError, describe_error
from dvpo_service.host import stopping

log = logging.getLogger(__name__)

POLL_S = 0.25
# After one rank failed, how long to wait until it shows whether other ranks died.
_PEER_GRACE_S = 5.0


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one pool meet."""

    rank: int
    world_size: int
    address: str
    port: int
    timeout_s: float


class EngineLost(RuntimeError):
    """An engine's own processes are dead or broken: its actor can do nothing more."""


class PoolError(RuntimeError):
    """An actor of a pool died, raised, or missed its deadline.

    Attributes:
      lost: the actors are gone or hang, so fresh ones may succeed. False means that the call itself failed, and would
        fail again.
    """

    def __init__(self, pool: str, method: str, cause: str, *, lost: bool = False):
        super().__init__(f"pool {pool!r}, in {method}: {cause}. Its processes' logs: {_log_folder()}")
        self.pool, self.method, self.cause, self.lost = pool, method, cause, lost


class RestartBudgetExhausted(PoolError, UserError):
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
    """Return the folder where this Ray session keeps what its actors print."""
    node = ray._private.worker._global_node
    return node.get_logs_dir_path() if node else "ray-session/logs"


def wait_for(refs: Any, timeout_s: float) -> Any:
    """Return ``ray.get(refs)``, waiting in short pieces, so that a request to stop can end the wait.

    Raises:
      Stopped: a stop was requested. Everything that ``ray.get`` raises is raised too.
    """
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
        """Return the results in actor order.

        Raises:
          PoolError: an actor died, raised, or missed the deadline.
          OSError: an actor could not write (a full disk).
        """
        try:
            return wait_for(self.refs, self.timeout_s)
        except GetTimeoutError as error:
            raise self._error(f"no answer within {self.timeout_s:g} s", lost=True) from error
        except RayActorError as error:
            raise self._error(f"an actor died: {describe_error(error)}", lost=True) from error
        except RayTaskError as error:
            disk_error = storage_error(error.cause)
            if disk_error is not None:
                raise disk_error from error
            lost = _is_hardware_error(error.cause) or self._lost_a_peer()
            raise self._error(describe_error(error.cause), lost=lost) from error
        except RayError as error:  # an object or a node was lost on the way
            raise self._error(describe_error(error), lost=True) from error

    def finished(self, within_s: float) -> bool:
        """Wait ``within_s`` at most, and return whether ``result`` would now return or raise at once."""
        done, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=within_s)
        return len(done) == len(self.refs) or any(isinstance(outcome(ref), RayError) for ref in done)

    def _error(self, cause: str, *, lost: bool) -> PoolError:
        return PoolError(self.pool, self.method, cause, lost=lost)

    def _lost_a_peer(self) -> bool:
        """Return whether an actor died. Others may have failed only because of that, and reported it first."""
        done, _ = ray.wait(self.refs, num_returns=len(self.refs), timeout=_PEER_GRACE_S)
        return any(isinstance(outcome(ref), RayActorError) for ref in done)


def storage_error(cause: BaseException) -> OSError | None:
    """Return the OSError that a call raised, if any, also from inside torch's CheckpointException for all ranks."""
    errors = [cause]
    if isinstance(cause, CheckpointException):
        errors = [error for error, _ in cause.failures.values()]
    return next((error for error in errors if isinstance(error, OSError)), None)


def _is_hardware_error(cause: BaseException) -> bool:
    """Return whether the cause is a lost connection or a device's fault, and not a mistake in the code."""
    return isinstance(cause, torch.distributed.DistError | torch.AcceleratorError)


def outcome(ref: Any) -> Any:
    """Return the value of a finished call, or its RayError."""
    try:
        return ray.get(ref, timeout=_PEER_GRACE_S)
    except RayError as error:
        return error


class Pool:
    """A list of actors of one kind."""

    def __init__(self, name: str, actors: list[Any], *, timeout_s: float):
        self.name, self.actors, self.timeout_s = name, actors, timeout_s

    def shutdown(self) -> None:
        """End every actor."""
        for actor in self.actors:
            ray.kill(actor)
