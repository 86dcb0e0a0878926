"""The HTTP server of a gateway replica.

Clients connect to it directly, not through Ray Serve's proxies: a proxy adds a hop, and costs as much CPU per request
as the gateway itself. Ray Serve keeps the replica alive. The gateways of a node listen on the same port, and the kernel
spreads the connections over them.
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
    """Where the server listens for HTTP.

    Attributes:
      host, port: the address to listen on.
      node: the IP address of the Ray node that listens.
      key_digest: the SHA-256 of the API key that requests must send, in hex; None when no key is required.
    """

    host: str
    port: int
    node: str
    key_digest: str | None


class HttpServer:
    """A deployment that serves the app that ``build`` returns, at ``address``, until the replica ends.

    ``parts`` are the deployments that the app calls. They are arguments so that Ray Serve deploys them too.
    """

    def __init__(self, build: Callable[[], FastAPI], address: ListenAddress, drain_timeout_s: float, *parts: Any):
        settings = uvicorn.Config(
            build(), log_config=None, access_log=False, timeout_graceful_shutdown=max(1, round(drain_timeout_s))
        )
        self.server = uvicorn.Server(settings)
        self.address = address
        self._socket = listen(address.host, address.port, shared=True)
        self._serving: asyncio.Task[None] | None = None

    async def reconfigure(self, _: object) -> None:
        """Start the server. Ray Serve calls this on the requests' event loop before the replica counts as healthy."""
        if self._serving is None:
            self._serving = asyncio.create_task(self.server.serve([self._socket]))
        while not self.server.started:
            await self.check_health()
            await asyncio.sleep(0.01)

    async def ready(self) -> ListenAddress:
        """Return the address where this replica listens."""
        return self.address

    async def check_health(self) -> None:
        """Raise RuntimeError when the HTTP server has ended; Ray Serve then replaces the replica."""
        if self._serving and self._serving.done():
            raise RuntimeError(f"the HTTP server ended: {self._serving.exception()}")

    async def __del__(self) -> None:
        """Finish the responses under way, within the drain time. Ray Serve awaits this when a replica ends."""
        self.server.should_exit = True
        if self._serving:
            await self._serving
