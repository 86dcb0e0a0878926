"""Which network interface gloo takes."""

from __future__ import annotations

import os

import psutil
import pytest

from dvpo_service.host.network import own_address, use_interface_of


def test_the_interface_of_an_address_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "x")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")  # so that monkeypatch restores it afterwards
    use_interface_of("203.0.113.9")
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "an address of no interface: gloo's own choice"
    use_interface_of("127.0.0.1")
    chosen = os.environ["GLOO_SOCKET_IFNAME"]
    assert any(a.address == "127.0.0.1" for a in psutil.net_if_addrs()[chosen])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen-by-a-person")
    use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen-by-a-person"


def test_the_way_to_itself_is_the_hosts_own_address() -> None:
    assert own_address("127.0.0.1", 9) == "127.0.0.1"
