"""This host's network interfaces: where sockets listen, and which interface gloo uses.

By default gloo takes the interface that the host's name resolves to. That is often the loopback, which no other host
reaches.
"""

from __future__ import annotations

import os
import socket

import psutil


def use_interface_of(address: str) -> None:
    """Make gloo in this process use the interface that has ``address``, unless GLOO_SOCKET_IFNAME is set already.

    Where no interface has it (an address that is translated on its way), the choice is left to gloo.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


def own_address(towards: str, port: int) -> str:
    """Return this host's address on the route to ``towards``, another host or this one."""
    family, kind, protocol, _, target = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as route:
        route.connect(target)  # a datagram socket sends nothing here
        return route.getsockname()[0]


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def listen(host: str, port: int, *, shared: bool) -> socket.socket:
    """Return a socket bound to ``host:port``; ``shared`` sockets can bind the same port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening
