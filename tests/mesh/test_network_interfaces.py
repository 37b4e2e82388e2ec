"""Which interfaces this PC has, and when that changes."""

import asyncio
import ipaddress
import socket
import types

import psutil
import pytest

from tars.core.addresses import InterfaceAddress, own_addresses
from tars.mesh import network_interfaces
from tars.mesh.network_interfaces import Interface, NetworkWatch, interfaces

HOME = Interface("wlan0", True, (InterfaceAddress("wlan0", "192.168.1.5/24"),))
VPN = Interface("tailscale0", True, (InterfaceAddress("tailscale0", "100.64.0.7/32"),))


def test_this_pcs_interfaces_are_read_with_their_networks():
    found = {each.name: each for each in interfaces()}
    loopback = [each for each in found.values() if any(address.network.ip.is_loopback for address in each.addresses)]
    assert loopback
    assert any(address.address == "127.0.0.1/8" for each in loopback for address in each.addresses)
    for each in found.values():
        for address in each.addresses:
            assert address.interface == each.name
            assert isinstance(address.network, ipaddress.IPv4Interface | ipaddress.IPv6Interface)
    assert own_addresses("0.0.0.0", 1, [address for each in found.values() for address in each.addresses])


def entry(family, address, netmask=None):
    return types.SimpleNamespace(family=family, address=address, netmask=netmask)


def test_what_is_down_has_no_address_or_makes_no_sense_is_left_out(monkeypatch):
    v4, v6 = socket.AF_INET, socket.AF_INET6
    listed = {
        "up0": [
            entry(v4, "10.0.0.5", "255.255.0.0"),
            entry(v6, "fe80::1%up0", "ffff:ffff:ffff:ffff::"),
            entry(17, "02:00:00:00:00:01"),
        ],
        "down0": [entry(v4, "10.1.0.5", "255.255.0.0")],
        "bare0": [entry(17, "02:00:00:00:00:02")],
        "tun0": [entry(v4, "100.64.0.7"), entry(v4, "nonsense", "255.0.0.0")],
    }
    states = {
        "up0": types.SimpleNamespace(isup=True, flags="up,broadcast,running,multicast"),
        "down0": types.SimpleNamespace(isup=False, flags=""),
        "bare0": types.SimpleNamespace(isup=True, flags=""),
        "tun0": types.SimpleNamespace(isup=True, flags="up,pointopoint,noarp"),
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: listed)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)
    assert interfaces() == (
        Interface("tun0", False, (InterfaceAddress("tun0", "100.64.0.7/32"),)),
        Interface("up0", True, (InterfaceAddress("up0", "10.0.0.5/16"), InterfaceAddress("up0", "fe80::1%up0/64"))),
    )


def test_a_system_that_does_not_say_has_none(monkeypatch):
    def refuses():
        raise PermissionError("not here")

    monkeypatch.setattr(psutil, "net_if_addrs", refuses)
    assert interfaces() == ()


async def test_a_change_is_told_once_to_everybody(caplog):
    now = [(HOME,)]
    watch = NetworkWatch(lambda: now[-1], seconds=0.001)
    told = asyncio.Event()
    heard = []
    watch.on_change(lambda: heard.append(watch.current))
    watch.on_change(told.set)
    assert watch.addresses == (InterfaceAddress("wlan0", "192.168.1.5/24"),)
    assert not watch.look()
    running = asyncio.create_task(watch.run())
    now.append((VPN, HOME))
    await asyncio.wait_for(told.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert heard == [(VPN, HOME)]
    assert len(watch.addresses) == 2


def test_the_real_list_is_what_is_watched():
    assert NetworkWatch().current == network_interfaces.interfaces()
