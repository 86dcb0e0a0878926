"""Hosts on this machine: network namespaces on a bridge, each with its own address, /dev/shm and /tmp.

with Network() as network:
    host = network.host("a")
    host.run("ip", "addr")      # in that host
    network.cut(host)           # its cable is pulled
    network.join(host)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

SUBNET = f"10.213.{os.getpid() % 250 + 1}"  # differs between test runs on one machine


def why_not() -> str | None:
    """Return why this machine cannot make network namespaces, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the `ip` command (iproute2)"
    name = f"dvt{uuid.uuid4().hex[:6]}"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if added.returncode:
        return f"`ip netns add` does not work here: {added.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class Host:
    """A namespace with one interface, ``eth0``, on the bridge.

    ``holder`` is a process in the namespace. It keeps the host's own mounts alive: /dev/shm, and a /tmp in ``folder``.
    Programs on another host see neither the files nor the processes of this one, as between real machines. All
    processes of the host end with the holder.
    """

    name: str
    address: str
    folder: Path
    holder: subprocess.Popen[bytes]

    @property
    def inside(self) -> list[str]:
        """The words to put before a command so that it runs on this host."""
        [first] = psutil.Process(self.holder.pid).children()
        return ["nsenter", f"--target={first.pid}", "--mount", "--net", "--pid", "--"]

    @property
    def cable(self) -> str:
        """The bridge's end of this host's link."""
        return f"{self.name}-b"

    def run(self, *command: str) -> str:
        done = subprocess.run([*self.inside, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


@dataclass
class Network:
    """Hosts on one bridge. This machine is on it as ``SUBNET``.1. Everything is removed when the block ends."""

    hosts: list[Host] = field(default_factory=list)
    # Short, because names of interfaces have at most 15 characters.
    tag: str = field(default_factory=lambda: f"dv{uuid.uuid4().hex[:5]}")

    def __enter__(self) -> Self:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{SUBNET}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *exc: object) -> None:
        for host in self.hosts:
            host.holder.kill()
            host.holder.wait(10)
            ip("netns", "del", host.name)
            shutil.rmtree(host.folder, ignore_errors=True)
        ip("link", "del", self.bridge)

    @property
    def bridge(self) -> str:
        return f"{self.tag}-br"

    def host(self, name: str, shared: Sequence[Path] = ()) -> Host:
        """Add a host and return it. ``shared``: folders below /tmp that the host sees as well, as over NFS."""
        number = len(self.hosts) + 10
        host_name, address = f"{self.tag}-{name}", f"{SUBNET}.{number}"
        folder = Path(tempfile.mkdtemp(prefix=f"{host_name}-", dir="/var/tmp"))
        ip("netns", "add", host_name)
        ip("link", "add", f"{host_name}-b", "type", "veth", "peer", "name", "eth0", "netns", host_name)
        ip("link", "set", f"{host_name}-b", "master", self.bridge, "up")
        for step in (
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "via", f"{SUBNET}.1"],
        ):
            ip("-n", host_name, *step)
        host = Host(host_name, address, folder, _hold(host_name, folder, shared))
        self.hosts.append(host)
        host.run("true")
        return host

    def cut(self, host: Host) -> None:
        """Cut a host off the network. Its processes go on."""
        ip("link", "set", host.cable, "down")

    def join(self, host: Host) -> None:
        """Undo ``cut``."""
        ip("link", "set", host.cable, "up")


def _hold(name: str, folder: Path, shared: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start a process in the namespace with mounts of its own. `ip netns exec` already gives it a mount namespace."""
    binds = [f"mkdir -p {folder}/{i} && mount --bind {path} {folder}/{i}" for i, path in enumerate(shared)]
    script = [
        "mount -t tmpfs tmpfs /dev/shm",
        f"mkdir -p {folder}/tmp",
        *binds,
        f"mount --bind {folder}/tmp /tmp",
        *(f"mkdir -p {path} && mount --bind {folder}/{i} {path}" for i, path in enumerate(shared)),
        "echo ready",
        "exec sleep infinity",
    ]
    # Also a process namespace, because Ray's driver looks for a raylet among the processes that it sees.
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = ["ip", "netns", "exec", name, *alone, "bash", "-euc", "\n".join(script)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert holder.stdout is not None
    first = holder.stdout.readline()
    assert first == b"ready\n", first + holder.stdout.read()
    return holder
