"""Which network interfaces this PC has, and when that changes: cables, Wi-Fi, VPNs and tailnets come and go while a node runs.

Law of this file: it reads the system's list and says what changed; what follows from it is `core.addresses`' and `discovery`'s business.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tars.core.addresses import InterfaceAddress

_log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
"""Reading the list takes under a millisecond; the same on every system, where events of the kernel are not."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface that is up. `multicast` is what the system says; WSL2 and tailnets say yes and carry none."""

    name: str
    multicast: bool
    addresses: tuple[InterfaceAddress, ...]


def interfaces() -> tuple[Interface, ...]:
    """Those that are up and have an address, by name. Empty where the system does not say (logged at debug level)."""
    try:
        addresses = psutil.net_if_addrs()
        states = psutil.net_if_stats()
    except OSError as error:  # an interface that went between the two
        _log.debug("the network interfaces could not be read: %s", error)
        return ()
    found = []
    for name in sorted(addresses):
        state = states.get(name)
        if state is not None and not state.isup:
            continue
        own = sorted(
            {
                InterfaceAddress(name, text)
                for each in addresses[name]
                if each.family in (socket.AF_INET, socket.AF_INET6)
                and (text := _with_network(each.address, each.netmask))
            }
        )
        if own:
            flags = getattr(state, "flags", "")
            # Where the flags are not known (Windows), trying shows it.
            found.append(Interface(name, not flags or "multicast" in flags.split(","), tuple(own)))
    return tuple(found)


def _with_network(address: str, netmask: str | None) -> str | None:
    """`192.168.1.5/24`; without a netmask (a tunnel's end) the address alone is its network; None where it is no address."""
    try:
        ip = ipaddress.ip_address(address)
        if not netmask:
            return f"{ip}/{ip.max_prefixlen}"
        return f"{ip}/{int(ipaddress.ip_address(netmask)).bit_count()}"
    except ValueError:
        return None


class NetworkWatch:
    """`current` is what was there when it was last looked; `on_change` is told when that became something else."""

    def __init__(self, read: Callable[[], tuple[Interface, ...]] = interfaces, seconds: float = POLL_SECONDS) -> None:
        self._read = read
        self._seconds = seconds
        self._told: list[Callable[[], None]] = []
        self.current = read()

    @property
    def addresses(self) -> tuple[InterfaceAddress, ...]:
        """All addresses of this PC, for `core.addresses.own_addresses` and `Viewer.of`."""
        return tuple(address for interface in self.current for address in interface.addresses)

    def on_change(self, told: Callable[[], None]) -> None:
        """`told` is called after `current` changed."""
        self._told.append(told)

    def look(self) -> bool:
        """Look now; whether something changed."""
        found = self._read()
        if found == self.current:
            return False
        _log.info("this PC's network changed: %s", ", ".join(each.name for each in found) or "no interface is up")
        self.current = found
        for told in self._told:
            told()
        return True

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            self.look()
