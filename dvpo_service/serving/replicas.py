"""Calls to a deployment that survive the death of a replica: they are made again on another one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
# Errors that mean that a replica is gone, not that the request is wrong.
GONE = (RayActorError, DeploymentUnavailableError)


class Unavailable(Exception):
    """No replica answered within the deadline, or one died in the middle of a stream."""


class Replicas:
    """The replicas of one deployment, with a deadline on every call.

    Args:
      handle: the deployment's handle.
      timeout_s: the deadline of a call, or of a whole stream, in seconds.
    """

    def __init__(self, handle: DeploymentHandle, *, timeout_s: float):
        self.handle = handle
        self.timeout_s = timeout_s

    async def call(self, method: Callable[..., Awaitable[T]], *args: Any, timeout_s: float | None = None) -> T:
        """Return the result of a method on some replica: ``await policy.call(PolicyServer.complete, kind, body)``.

        The method may run twice, on two replicas, so it must not change anything.

        Args:
          method: a method of the deployment's class.
          args: its arguments after ``self``.
          timeout_s: the deadline in seconds, in place of the one of the constructor.

        Raises:
          Unavailable: no replica answered within the deadline. Errors that the method raises are raised as they are.
        """
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        async for left in _attempts(deadline):
            try:
                return await asyncio.wait_for(getattr(self.handle, method.__name__).remote(*args), left)
            except GONE:
                continue
            except RayTaskError as error:
                raise error.cause from None
            except TimeoutError:
                break
        raise Unavailable(f"no answer within {timeout_s or self.timeout_s:g} s")

    async def stream(self, method: Callable[..., AsyncIterator[Any]], *args: Any) -> AsyncIterator[Any]:
        """Yield what a method of some replica yields; its first item is a header.

        The call is made again on another replica only while nothing after the header has arrived.

        Args:
          method: a method of the deployment's class.
          args: its arguments after ``self``.

        Raises:
          Unavailable: no replica answered within the deadline, or a replica died in the middle of the stream.
        """
        deadline = time.monotonic() + self.timeout_s
        async for _ in _attempts(deadline):
            items = getattr(self.handle.options(stream=True), method.__name__).remote(*args)
            try:
                header = await _next(items, deadline)
                first = await _next(items, deadline)
            except GONE:
                continue
            yield header
            try:
                while first is not None:
                    yield first
                    first = await _next(items, deadline)
            except GONE as error:
                raise Unavailable("its replica died") from error
            return
        raise Unavailable(f"no answer within {self.timeout_s:g} s")


async def _next(items: Any, deadline: float) -> Any:
    """Return the next item, or None at the end. Raises Unavailable at the deadline."""
    try:
        return await asyncio.wait_for(anext(items, None), max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        items.cancel()
        raise Unavailable("the response took longer than serve.request_timeout_s") from None


async def _attempts(deadline: float) -> AsyncIterator[float]:
    """Yield the seconds left, once per attempt, until the deadline; the pauses in between grow."""
    pause = FIRST_PAUSE_S
    while (left := deadline - time.monotonic()) > 0:
        yield left
        await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE_S)
