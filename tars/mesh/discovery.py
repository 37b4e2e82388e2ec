"""Multicast DNS: this node says on the LAN where it is, and hears where others of its mesh are.

Law of this file: what is heard only ever suggests an address to `Seeds`; nothing of it is believed, for everybody on the LAN may say
anything. Who answers at an address is proved by a certificate. Where multicast does not work, that is one line in the log and no error:
configured seeds and gossip do without. Formats: RFC 6762 (multicast DNS), RFC 6763 (DNS-SD: PTR, SRV and TXT of a service).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import random
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from zeroconf import Error as ZeroconfError
from zeroconf import ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from tars.core.addresses import is_tailnet, is_virtual, join, parse
from tars.core.types import NodeId
from tars.devices import wsl2
from tars.mesh.network_interfaces import Interface

_log = logging.getLogger(__name__)

SERVICE_TYPE = "_tars._tcp.local."
SWEEP_SECONDS = 30.0
"""How often the heard names are gone through for those that a flood crowded out, and a failed start is tried again."""
GOODBYE_SECONDS = 3.0
"""Three goodbye packets, an eighth of a second apart, and the sockets' end; a node that stops does not wait longer."""
ASK_SECONDS = 1.5
MOST_ASKED_AT_ONCE = 8
"""Announcements that came without their address are asked for it; junk costs the LAN at most 5 questions a second so."""
MOST_READ_A_SECOND = 200
"""Announcements that are read as they come. More is a flood; the sweep finds what was left out."""
MOST_WAITING = 256
MOST_HEARD = 1024
"""More nodes than anybody has on one LAN."""
MOST_RECORDS = 8000
"""Heard and remembered, of every kind of service. A large office has some hundred."""
MOST_STRANGERS = 4096
STRANGER_SECONDS = 600.0
"""How long the sweep leaves alone what was no node of this mesh."""
MOST_INTERFACES = 16
"""Linux lets a socket join 20 multicast groups (net.ipv4.igmp_max_memberships)."""
MOST_ADDRESSES = 8

_NODE_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,32}")


class Sightings(Protocol):
    """Where suggestions go (`Seeds`)."""

    def discovered(self, key: str, addresses: Sequence[str]) -> None:
        """Somebody announces a node there."""

    def withdrawn(self, key: str) -> None:
        """Nobody does any longer."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says of itself by multicast. None of it is proved."""

    node: NodeId
    addresses: tuple[str, ...]
    version: str = ""


def read_announcement(
    name: str, properties: Mapping[bytes, bytes | None], port: int | None, ips: Sequence[str], mesh: str
) -> Announcement | None:
    """An announcement of a node of `mesh`, None for anything else, however odd. `ips`: with a scope where they are link-local.

    The instance's name and the TXT entry `node` must both be the NodeId. Addresses that lead nowhere from here (loopback, multicast,
    unspecified) are left out; link-local IPv6 ones are taken only where there is nothing else.
    """
    node = name.removesuffix("." + SERVICE_TYPE)
    if (
        not _NODE_ID.fullmatch(node)
        or properties.get(b"node") != node.encode()
        or properties.get(b"mesh") != mesh.encode()
    ):
        return None
    plain: list[str] = []
    link_local: list[str] = []
    for text in ips:
        with suppress(ValueError):
            ip = ipaddress.ip_address(text)
            address = join(text, port or 0)
            if ip.is_loopback or ip.is_multicast or ip.is_unspecified or ip.is_reserved:
                continue
            if ip.version == 6 and ip.is_link_local:
                if "%" in text:
                    link_local.append(address)
            else:
                plain.append(address)
    # The library lists the newest address first: an order that says nothing. Sorted, the same announcement is always the same.
    addresses = tuple(sorted(set(plain or link_local), key=lambda each: (each.startswith("["), each))[:MOST_ADDRESSES])
    if not addresses:
        return None
    version = (properties.get(b"version") or b"").decode("ascii", "replace")
    return Announcement(NodeId(node), addresses, version if _VERSION.fullmatch(version) else "")


@dataclass(frozen=True, slots=True)
class _Place:
    """What is announced, and where: when it becomes another, multicast DNS starts anew."""

    sockets: tuple[str | int, ...]
    ips: tuple[str, ...]
    port: int


def announced_place(
    interfaces: Sequence[Interface], addresses: Sequence[str]
) -> tuple[tuple[str | int, ...], tuple[str, ...], int]:
    """(what multicast is sent and heard on: an IPv4 address or an IPv6 interface's index each, announced IPs, announced port).

    An announcement has one port: that of the first address that is an IP; names and other ports are for gossip and seeds. No loopback.
    A tailnet carries no multicast. Bridges to containers come last, where there are more interfaces than groups can be joined.
    """
    sockets: list[str | int] = []
    for interface in sorted(interfaces, key=lambda each: is_virtual(each.name)):
        usable = [ip for address in interface.addresses if not is_tailnet(ip := address.network.ip)]
        if not interface.multicast or not usable:
            continue
        v4 = [str(ip) for ip in usable if ip.version == 4]
        if v4:
            sockets.append(v4[0])
        else:
            with suppress(OSError):
                sockets.append(socket.if_nametoindex(interface.name))
    endpoints = [
        endpoint for endpoint in map(parse, addresses) if endpoint.ip is not None and not endpoint.ip.is_loopback
    ]
    port = endpoints[0].port if endpoints else 0
    announced = [endpoint.host for endpoint in endpoints if endpoint.port == port and not endpoint.scope]
    return tuple(sockets[:MOST_INTERFACES]), tuple(announced[:MOST_ADDRESSES]), port


class Discovery:
    """Announces this node and reports others of the mesh to `seeds`, from `run` until it is cancelled; then it says goodbye.

    `mesh`: the mesh's public name (`Identity.mesh_id`). `addresses` and `interfaces` are asked anew whenever `refresh` is called.
    """

    def __init__(
        self,
        node: NodeId,
        mesh: str,
        version: str,
        seeds: Sightings,
        *,
        addresses: Callable[[], Sequence[str]],
        interfaces: Callable[[], Sequence[Interface]],
        on_wsl2: Callable[[], bool] = lambda: bool(wsl2.detect(Path("/"), os.environ)),
        sweep_seconds: float = SWEEP_SECONDS,
    ) -> None:
        self._name = f"{node}.{SERVICE_TYPE}"
        self._server = f"{node}.local."
        self._properties = {"node": str(node), "mesh": mesh, "version": version}
        self._mesh = mesh
        self._seeds = seeds
        self._addresses = addresses
        self._interfaces = interfaces
        self._on_wsl2 = on_wsl2
        self._sweep_seconds = sweep_seconds
        self._wake = asyncio.Event()
        self._work = asyncio.Event()
        self._place: _Place | None = None
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._asking: asyncio.Task[None] | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._waiting: dict[str, None] = {}
        self._strangers: dict[str, float] = {}
        self._tokens = float(MOST_READ_A_SECOND)
        self._filled = 0.0
        self._said = False
        self._trouble = ""
        self._was_open = False
        self.heard: dict[str, Announcement] = {}
        """By the service's name: nodes that say they are of this mesh, for the status page."""

    def refresh(self) -> None:
        """This PC's network or addresses changed."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        quiet = logging.getLogger("zeroconf")
        quiet.addFilter(self._library_says)
        try:
            if self._on_wsl2():
                self._say_once("WSL2 does not reliably carry it to and from the LAN")
            while True:
                sockets, ips, port = announced_place(self._interfaces(), self._addresses())
                place = _Place(sockets, ips, port)
                if place != self._place or self._zeroconf is None or self._is_flooded():
                    await self._shut()
                    self._place = place
                    self._trouble = ""
                    self._open(place)
                elif self._trouble:
                    self._say_once(self._trouble)
                self._sweep()
                # Not wait_for: that of Python 3.11 loses a cancellation that comes together with the event.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._sweep_seconds):
                        await self._wake.wait()
                self._wake.clear()
        finally:
            try:
                await self._shut()
            finally:
                quiet.removeFilter(self._library_says)

    # --- starting and stopping ----------------------------------------------------------------------------------------

    def _open(self, place: _Place) -> None:
        if not place.sockets:
            # A cable that was pulled is another matter: the watch of the network says so.
            return None if self._was_open else self._say_once("no network interface here carries it")
        # An IPv6 socket that cannot be made (IPv6 switched off) must not take IPv4 with it.
        choices: list[list[str | int]] = [
            list(place.sockets),
            [each for each in place.sockets if isinstance(each, str)],
        ]
        reason = ""
        for sockets in choices[: 1 if choices[0] == choices[1] else 2]:
            try:
                self._zeroconf = AsyncZeroconf(interfaces=[*sockets]) if sockets else None
            except (OSError, RuntimeError, ZeroconfError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if self._zeroconf is not None:
                break
        if self._zeroconf is None:
            return self._say_once(reason)
        self._was_open = True
        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._hear])
        self._asking = asyncio.create_task(self._ask_waiting(self._zeroconf))
        if place.ips:
            self._announcing = asyncio.create_task(self._announce(self._zeroconf, place))
        return None

    async def _announce(self, multicast: AsyncZeroconf, place: _Place) -> None:
        service = AsyncServiceInfo(
            SERVICE_TYPE,
            self._name,
            port=place.port,
            properties=self._properties,
            server=self._server,
            parsed_addresses=list(place.ips),
        )
        try:
            # Nobody else has this name, a random UUID. Asking whether somebody has it would let anybody keep this node from announcing.
            await (await multicast.async_register_service(service, cooperating_responders=True))
        except (OSError, ZeroconfError, TimeoutError) as error:
            self._say_once(str(error) or type(error).__name__)

    async def _shut(self) -> None:
        """Say goodbye and close; when it is cancelled half-way, the next call goes on."""
        tasks = [task for task in (self._asking, self._announcing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._asking = self._announcing = None
        for name in list(self.heard):
            self._forget(name)
        self._waiting.clear()
        self._strangers.clear()
        browser, self._browser = self._browser, None
        if browser is not None:
            await browser.async_cancel()
        multicast, self._zeroconf = self._zeroconf, None
        if multicast is not None:
            self._closing = asyncio.create_task(self._close(multicast))
        if self._closing is not None:
            # The library loses its sockets when it is cancelled while it closes.
            await asyncio.shield(self._closing)
            self._closing = None

    @staticmethod
    async def _close(multicast: AsyncZeroconf) -> None:
        with suppress(TimeoutError, OSError, ZeroconfError):
            async with asyncio.timeout(GOODBYE_SECONDS):
                await multicast.async_close()

    def _library_says(self, record: logging.LogRecord) -> bool:
        """What the library warns of (no route, no buffer) becomes this node's one line, unless the network turns out to have changed."""
        if record.levelno < logging.WARNING:
            return True
        self._trouble = record.getMessage()
        return False

    def _say_once(self, reason: str) -> None:
        if not self._said:
            self._said = True
            _log.warning(
                "multicast DNS may not work here (%s); nodes that it does not find are found by [mesh] seeds and by each other",
                reason,
            )

    # --- hearing others -----------------------------------------------------------------------------------------------

    def _hear(self, zeroconf: Any, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Called by the library for every change, a flood of them too: cheap, and bounded in what it keeps."""
        if not self._is_other_node(name):
            return
        if state_change is ServiceStateChange.Removed:
            self._waiting.pop(name, None)
            self._forget(name)
            return
        now = asyncio.get_running_loop().time()
        self._tokens = min(MOST_READ_A_SECOND, self._tokens + (now - self._filled) * MOST_READ_A_SECOND)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            service = AsyncServiceInfo(SERVICE_TYPE, name)
            if service.load_from_cache(zeroconf):
                self._take(name, service)
                return
        self._wait_for(name)

    def _is_other_node(self, name: str) -> bool:
        return name != self._name and _NODE_ID.fullmatch(name.removesuffix("." + SERVICE_TYPE)) is not None

    def _wait_for(self, name: str) -> None:
        if name in self._waiting:
            return
        if len(self._waiting) >= MOST_WAITING:
            # At random, so that a flood cannot count on keeping one node out; the sweep brings it back.
            del self._waiting[random.choice(list(self._waiting))]
        self._waiting[name] = None
        self._work.set()

    def _take(self, name: str, service: AsyncServiceInfo) -> None:
        """Read what is known of a service by now."""
        try:
            found = read_announcement(
                name, service.properties, service.port, service.parsed_scoped_addresses(), self._mesh
            )
        except (ValueError, IndexError, UnicodeError) as error:  # TXT is free text of strangers
            _log.debug("an announcement cannot be read: %r", error)
            found = None
        if found is not None:
            self._strangers.pop(name, None)
            if name not in self.heard and len(self.heard) >= MOST_HEARD:
                self._forget(random.choice(list(self.heard)))
            self.heard[name] = found
            self._seeds.discovered(name, found.addresses)
            return
        self._forget(name)
        self._remember_stranger(name)

    def _forget(self, name: str) -> None:
        if self.heard.pop(name, None) is not None:
            self._seeds.withdrawn(name)

    def _remember_stranger(self, name: str) -> None:
        if len(self._strangers) >= MOST_STRANGERS:
            del self._strangers[next(iter(self._strangers))]
        self._strangers[name] = asyncio.get_running_loop().time() + STRANGER_SECONDS

    async def _ask_waiting(self, multicast: AsyncZeroconf) -> None:
        """Ask for what announcements left out, a few at a time."""
        asked: set[asyncio.Task[None]] = set()
        newest = False
        try:
            while True:
                while self._waiting and len(asked) < MOST_ASKED_AT_ONCE:
                    # In turn the newest, for after a flood nobody waits behind its rest, and any, for during one the newest is junk.
                    newest = not newest
                    name = next(reversed(self._waiting)) if newest else random.choice(list(self._waiting))
                    del self._waiting[name]
                    asked.add(asyncio.create_task(self._ask(multicast, name)))
                self._work.clear()
                more = asyncio.create_task(self._work.wait())
                try:
                    done, _ = await asyncio.wait([more, *asked], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    more.cancel()
                asked -= done
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, multicast: AsyncZeroconf, name: str) -> None:
        service = AsyncServiceInfo(SERVICE_TYPE, name)
        complete = False
        with suppress(ZeroconfError, OSError, TimeoutError):
            complete = await service.async_request(multicast.zeroconf, ASK_SECONDS * 1000)
        if complete:
            self._take(name, service)
        else:
            self._remember_stranger(name)

    def _is_flooded(self) -> bool:
        """The library keeps 10,000 records; when they are full it drops a good node's short-lived ones first. A new start forgets all."""
        if self._zeroconf is None:
            return False
        records = sum(len(each) for each in self._zeroconf.zeroconf.cache.cache.values())
        if records < MOST_RECORDS:
            return False
        _log.info("multicast DNS starts anew: %d records were heard, which is a flood", records)
        return True

    def _sweep(self) -> None:
        """Read what is known anew, for the library does not say when an old address ran out; and some of what a flood crowded out."""
        if self._zeroconf is None:
            return
        for name in list(self.heard):
            service = AsyncServiceInfo(SERVICE_TYPE, name)
            if service.load_from_cache(self._zeroconf.zeroconf):
                self._take(name, service)
        now = asyncio.get_running_loop().time()
        for name in [name for name, until in self._strangers.items() if until < now]:
            del self._strangers[name]
        cached = self._zeroconf.zeroconf.cache.entries_with_name(SERVICE_TYPE)
        names = {str(record.alias) for record in cached if hasattr(record, "alias")}
        unknown = [
            name
            for name in names
            if name not in self.heard and name not in self._strangers and self._is_other_node(name)
        ]
        for name in random.sample(unknown, min(len(unknown), MOST_WAITING)):
            self._wait_for(name)
