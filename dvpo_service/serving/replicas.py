"""Calls to a deployment that outlive its replicas: one that a replica's death cut off is made again on another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
# What says that a replica is gone, not that the request is wrong.
GONE = (RayActorError, DeploymentUnavailableError)


class Unavailable(Exception):
    """No replica answered within the deadline, or one died in the middle of a stream."""


class Replicas:
    """The replicas of one deployment, with a deadline on every call."""

    def __init__(self, handle: DeploymentHandle, *, timeout_s: float):
        self.handle, self.timeout_s = handle, timeout_s

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """The result of ``method(*args)`` on some replica. It may run twice: methods called so change nothing.

        Raises Unavailable, and what the method raises.
        """
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        async for left in _attempts(deadline):
            try:
                return await asyncio.wait_for(getattr(self.handle, method).remote(*args), left)
            except GONE:
                continue
            except RayTaskError as error:
                raise error.cause from None
            except TimeoutError:
                break
        raise Unavailable(f"no answer within {timeout_s or self.timeout_s:g} s")

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """What ``method(*args)`` yields. Made again only while nothing but its first item, the header, has come.

        Raises Unavailable.
        """
        deadline = time.monotonic() + self.timeout_s
        async for _ in _attempts(deadline):
            items = getattr(self.handle.options(stream=True), method).remote(*args)
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
    """The next item; None at the end. Raises Unavailable at the deadline."""
    try:
        return await asyncio.wait_for(anext(items, None), max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        items.cancel()
        raise Unavailable("the response took longer than serve.request_timeout_s") from None


async def _attempts(deadline: float) -> AsyncIterator[float]:
    """Seconds left, once an attempt, with growing pauses between, until the deadline."""
    pause = FIRST_PAUSE_S
    while (left := deadline - time.monotonic()) > 0:
        yield left
        await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE_S)
