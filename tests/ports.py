"""Where a process and its children listen."""

from __future__ import annotations

import psutil


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses and ports, an IPv4 address as such."""
    found: set[tuple[str, int]] = set()
    for member in (process, *process.children(recursive=True)):
        try:
            connections = member.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        found |= {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in connections if c.status == "LISTEN"}
    return found
