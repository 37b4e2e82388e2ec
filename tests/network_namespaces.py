"""PCs on a network, made of Linux network namespaces: each has its own interfaces, addresses and routes, and multicast between them works.

    with network(3) as lan:                       # 10.91.1.1 to 10.91.1.3 on one bridge
        lan.hosts[0].run("ip", "address")
    with network(2, 1) as both:                   # a second subnet behind a router that forwards no multicast
        ...

The bridges and the router live in a namespace of their own, so nothing of the machine's own network is touched. Needs root and `ip`.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_HANDLES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


def _ip(*arguments: str, check: bool = True) -> str:
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10, check=False)
    if check and ran.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {ran.stderr.strip()}")
    return ran.stdout


class Host:
    """One PC: a namespace with `lo` and `eth0`. Every process in it ends with it."""

    def __init__(self, network: Network, segment: int, number: int) -> None:
        self._network = network
        self.segment = segment
        self.name = f"{network.prefix}h{segment}x{number}"
        self.address = f"10.91.{segment}.{number}"
        self.address_v6 = f"fd91:0:0:{segment}::{number}"
        self.port = f"p{segment}x{number}"
        """Its end of the cable at the bridge."""

    def command(self, *arguments: object) -> list[str]:
        """The same command, run in this PC."""
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def run(self, *arguments: object, timeout: float = 20, check: bool = True, **options: Any) -> str:
        """Run a command to its end; its output."""
        ran = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=timeout, check=False, **options
        )
        if check and ran.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(map(str, arguments))}: {ran.stderr.strip()}")
        return ran.stdout

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, until the end of the block, is in this PC: sockets that it makes belong there for ever. Never await inside."""
        libc = ctypes.CDLL(None, use_errno=True)
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(_HANDLES / self.name, os.O_RDONLY)
            try:
                if libc.setns(there, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")
            finally:
                os.close(there)
            try:
                yield
            finally:
                if libc.setns(before, _CLONE_NEWNET):
                    os._exit(70)  # every later test would run in the wrong network
        finally:
            os.close(before)

    def socket_factory(self, address: tuple[Any, ...]) -> socket.socket:
        """For `aiohttp.TCPConnector(socket_factory=...)`: the session then connects from this PC."""
        family, kind, protocol = address[:3]
        with self.entered():
            made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made

    def add_card(self, segment: int, number: int) -> None:
        """A second network card, `eth1`, on another subnet: 10.91.<segment>.<number>."""
        end = f"{self.port}b"
        _ip("-n", self._network.router, "link", "add", end, "type", "veth", "peer", "name", "eth1", "netns", self.name)
        _ip("-n", self._network.router, "link", "set", end, "master", f"br{segment}", "up")
        _ip("-n", self.name, "link", "set", "eth1", "up")
        _ip("-n", self.name, "address", "add", f"10.91.{segment}.{number}/24", "broadcast", "+", "dev", "eth1")

    def unplug(self) -> None:
        """Pull the cable: the interface is still there, and knows that it is not connected."""
        _ip("-n", self._network.router, "link", "set", self.port, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("-n", self._network.router, "link", "set", self.port, "up")

    def silence(self) -> None:
        """Every frame to and from this PC vanishes, and nobody is told: a Wi-Fi card that sleeps."""
        self._port_state("0")

    def speak(self) -> None:
        """Frames pass again."""
        self._port_state("3")

    def _port_state(self, state: str) -> None:
        subprocess.run(
            ["ip", "netns", "exec", self._network.router, "bridge", "link", "set", "dev", self.port, "state", state],
            capture_output=True,
            timeout=10,
            check=True,
        )

    def deafen(self, to: Host) -> None:
        """What this PC sends to `to` (same subnet, IPv4) vanishes; what `to` sends arrives: half a partition."""
        assert self.segment == to.segment, "only between PCs of one subnet"
        nobody = "02:00:00:00:00:01"
        _ip("-n", self.name, "neighbour", "replace", to.address, "lladdr", nobody, "dev", "eth0", "nud", "permanent")

    def hear(self, to: Host) -> None:
        """What this PC sends to `to` arrives again."""
        _ip("-n", self.name, "neighbour", "delete", to.address, "dev", "eth0")

    def processes(self) -> list[int]:
        """Whatever runs in this PC."""
        return [int(line) for line in _ip("netns", "pids", self.name, check=False).split()]


class Network:
    """PCs on one or more subnets, 10.91.<segment>.0/24 and fd91:0:0:<segment>::/64, with a router between them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.prefix = f"tars{os.getpid()}-{secrets.token_hex(2)}-"
        self.router = f"{self.prefix}router"
        self.segments = [
            [Host(self, segment, number) for number in range(1, size + 1)]
            for segment, size in enumerate(sizes, start=1)
        ]

    @property
    def hosts(self) -> list[Host]:
        """All PCs, subnet by subnet."""
        return [host for segment in self.segments for host in segment]

    def _make(self) -> None:
        _ip("netns", "add", self.router)
        _ip("-n", self.router, "link", "set", "lo", "up")
        for setting in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            subprocess.run(
                ["ip", "netns", "exec", self.router, "sh", "-c", f"echo 1 > /proc/sys/{setting}"],
                capture_output=True,
                timeout=10,
                check=False,  # IPv6 may be switched off
            )
        for number, hosts in enumerate(self.segments, start=1):
            bridge = f"br{number}"
            # Without spanning tree and its delay a port forwards at once; without snooping multicast needs no querier.
            _ip("-n", self.router, "link", "add", bridge, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
            _ip("-n", self.router, "link", "set", bridge, "up")
            self._address(self.router, bridge, f"10.91.{number}.254", f"fd91:0:0:{number}::fe")
            for host in hosts:
                _ip("netns", "add", host.name)
                _ip(
                    "-n",
                    self.router,
                    "link",
                    "add",
                    host.port,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    host.name,
                )
                _ip("-n", self.router, "link", "set", host.port, "master", bridge, "up")
                _ip("-n", host.name, "link", "set", "lo", "up")
                _ip("-n", host.name, "link", "set", "eth0", "up")
                self._address(host.name, "eth0", host.address, host.address_v6)
                _ip("-n", host.name, "route", "add", "default", "via", f"10.91.{number}.254")

    @staticmethod
    def _address(namespace: str, interface: str, v4: str, v6: str) -> None:
        _ip("-n", namespace, "address", "add", f"{v4}/24", "broadcast", "+", "dev", interface)
        with suppress(RuntimeError):  # no IPv6 here
            _ip("-n", namespace, "address", "add", f"{v6}/64", "dev", interface, "nodad")

    def _remove(self) -> None:
        for name in (*(host.name for host in self.hosts), self.router):
            _delete(name)


def _delete(name: str) -> None:
    """A namespace lives on, unnamed, while a process is in it."""
    for process in _ip("netns", "pids", name, check=False).split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    _ip("netns", "delete", name, check=False)


def _remove_abandoned() -> None:
    """What a killed test run left: its process is in the name."""
    for handle in _HANDLES.glob("tars*-*-*") if _HANDLES.is_dir() else ():
        owner = re.match(r"tars(\d+)-", handle.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _delete(handle.name)


@contextmanager
def _made(sizes: Sequence[int]) -> Iterator[Network]:
    made = Network(sizes)
    try:
        made._make()
        yield made
    finally:
        made._remove()


@cache
def why_not() -> str | None:
    """Why no namespaces can be made here; None where they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces need root"
    for tool in ("ip", "bridge"):
        if not shutil.which(tool):
            return f"{tool} is not installed (Debian: apt-get install iproute2)"
    try:
        with _made((1,)) as lan:
            lan.hosts[0].run("true")
    except (RuntimeError, subprocess.SubprocessError) as error:
        return f"no network namespaces here: {error}"
    return None


@contextmanager
def network(*sizes: int) -> Iterator[Network]:
    """PCs on as many subnets as there are numbers; gone again at the end, with every process in them. Skips the test where it cannot."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    _remove_abandoned()
    with _made(sizes) as made:
        yield made
