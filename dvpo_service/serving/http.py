"""The HTTP server of a gateway replica.

Requests come straight to it, not through Ray Serve's proxies: those cost as much CPU a request as the gateway, and a
hop. Serve keeps the replica alive. Gateways of a node share its port, the kernel spreads the connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from dvpo_service.host.network import listen


@dataclass(frozen=True)
class ListenAddress:
    """Where HTTP is answered: an address to listen on, and the Ray node, by its IP address, to do so.

    ``key_digest`` is the SHA-256 of the API key that is asked for there, None for none.
    """

    host: str
    port: int
    node: str
    key_digest: str | None


class HttpServer:
    """Serves what ``build()`` makes, at ``address``, until the replica ends. ``parts`` are those behind."""

    def __init__(self, build: Callable[[], FastAPI], address: ListenAddress, drain_timeout_s: float, *parts: Any):
        settings = uvicorn.Config(
            build(), log_config=None, access_log=False, timeout_graceful_shutdown=max(1, round(drain_timeout_s))
        )
        self.server = uvicorn.Server(settings)
        self.address, self._socket = address, listen(address.host, address.port, shared=True)
        self._serving: asyncio.Task[None] | None = None

    async def reconfigure(self, _: object) -> None:
        """Serve calls this on the loop that requests run on, before it calls the replica healthy."""
        if self._serving is None:
            self._serving = asyncio.create_task(self.server.serve([self._socket]))
        while not self.server.started:
            await self.check_health()
            await asyncio.sleep(0.01)

    async def ready(self) -> ListenAddress:
        return self.address

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if self._serving and self._serving.done():
            raise RuntimeError(f"the HTTP server ended: {self._serving.exception()}")

    async def __del__(self) -> None:
        """Serve awaits this when a replica ends: responses under way are finished, within the drain time."""
        self.server.should_exit = True
        if self._serving:
            await self._serving
