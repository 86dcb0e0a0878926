"""This host's network interfaces: where sockets listen, and which one gloo uses. By itself gloo takes the one that the
host's name stands for, often the loopback, where no other host reaches it."""

from __future__ import annotations

import os
import socket

import psutil


def use_interface_of(address: str) -> None:
    """Have gloo in this process use the interface with this host's ``address``; GLOO_SOCKET_IFNAME of before wins."""
    found = (name for name, its in psutil.net_if_addrs().items() if any(a.address == address for a in its))
    if name := next(found, None):  # none: an address that is translated on its way; gloo's own choice then
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def own_address(towards: str, port: int) -> str:
    """This host's address on the route to another host, or to itself."""
    family, kind, protocol, _, where = socket.getaddrinfo(towards, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as route:
        route.connect(where)  # sends nothing: a datagram socket
        return route.getsockname()[0]


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def listen(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket bound to ``host:port``; a ``shared`` one leaves the port to further shared ones. Raises OSError."""
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
