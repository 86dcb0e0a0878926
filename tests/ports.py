"""Find the addresses where a process and its children listen."""

from __future__ import annotations

import psutil


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Return addresses and ports; an IPv4 address in IPv6 notation is returned as IPv4."""
    addresses: set[tuple[str, int]] = set()
    for member in (process, *process.children(recursive=True)):
        try:
            connections = member.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        addresses |= {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in connections if c.status == "LISTEN"}
    return addresses
