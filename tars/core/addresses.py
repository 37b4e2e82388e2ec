"""Where a node can be reached: which of its own addresses it tells others, and in which order another node tries them.

Law of this file: pure; which interfaces exist and what happened to a connection are in the arguments. An address is only ever a place
where somebody may be: who answers there is proved by a certificate, never by the address.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

MOST_ADVERTISED = 8
"""Addresses that a node tells of itself. They ride in gossip; a PC has two or three that matter, with IPv6 and a tailnet about six."""
MOST_OF_A_KIND = 2
"""Of one interface: IPv6 privacy extensions keep up to seven temporary addresses beside the lasting one."""
MOST_KNOWN = 16
"""Addresses kept for one peer, whatever it or others say of it."""
LONGEST_ADDRESS = 255 + 1 + 5
"""A DNS name of 255 bytes (RFC 1035), a colon and a port."""
FAILURE_SECONDS = 10.0
"""How long an address goes behind the others after it failed once; doubles with each failure in a row."""
LONGEST_FAILURE_SECONDS = 600.0
"""A PC that came home from a journey is found on the LAN again within ten minutes, at once if its network changed."""
TRUST_SECONDS = 300.0
"""How long an address that answered goes before ones that were never tried; then the best one gets another chance."""
SEEN_SECONDS = 3600.0
"""How long an address is kept that neither the peer nor the operator named, after it was last seen or answered."""

_TAILNET_V4 = ipaddress.IPv4Network("100.64.0.0/10")
"""RFC 6598; Tailscale, Headscale and NetBird give their nodes addresses from it."""
_TAILNET_V6 = ipaddress.IPv6Network("fd7a:115c:a1e0::/48")
"""Tailscale's IPv6 range."""
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_VIRTUAL = re.compile(
    r"docker\d|br-[0-9a-f]{12}$|veth|virbr|lxcbr|lxdbr|incusbr|podman|cni|cali|flannel|cilium|vmnet|vboxnet|vethernet|bridge1\d\d$"
    r"|hyper-v|awdl|llw",
    re.IGNORECASE,
)
"""Interfaces that lead to containers and virtual machines of the same PC. `br0` is not among them: people bridge their LAN so."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address in its parts. `ip` is None for a host's name; `scope` is an IPv6 interface, which only its own PC understands."""

    host: str
    port: int
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None

    @property
    def scope(self) -> str | None:
        """`eth0` or `3` of `fe80::1%eth0`."""
        return self.ip.scope_id if isinstance(self.ip, ipaddress.IPv6Address) else None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@lru_cache(maxsize=4096)
def parse(address: str) -> Endpoint:
    """`192.168.1.5:8001`, `[fe80::1%eth0]:8001` or `box.lan:8001` in its parts, in one spelling; ValueError says which form is right."""
    wrong = f'"{address[:LONGEST_ADDRESS]}" is not host:port, such as "192.168.1.5:8001", "[fd00::5]:8001" or "box.lan:8001"'
    if len(address) > LONGEST_ADDRESS:
        raise ValueError(wrong)
    host, separator, digits = address.rpartition(":")
    if not separator or not (digits.isascii() and digits.isdigit()) or len(digits) > 5 or not 0 < int(digits) < 65536:
        raise ValueError(wrong)
    port = int(digits)
    if host.startswith("[") and host.endswith("]"):
        try:
            return _of_ip(ipaddress.IPv6Address(host[1:-1]), port)
        except ValueError:
            raise ValueError(wrong) from None
    try:
        return _of_ip(ipaddress.IPv4Address(host), port)
    except ValueError:
        pass
    name = host.lower().removesuffix(".")
    labels = name.split(".")
    # A last part of digits only is a mistyped IPv4 address (WHATWG URL, 3.5): the resolver would read 10.1 as 10.0.0.1.
    if labels[-1].isdigit() or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(wrong)
    return Endpoint(name, port)


def _of_ip(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Endpoint:
    """What a socket that serves both families shows of an IPv4 peer (::ffff:192.0.2.1) is the IPv4 address."""
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return Endpoint(str(ip), port, ip)


def join(host: str, port: int) -> str:
    """`host:port` in the one spelling that `parse` gives; ValueError where it is no address."""
    return str(parse(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))


def is_tailnet(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to a tailnet (Tailscale and its like) by its range."""
    return ip in (_TAILNET_V4 if ip.version == 4 else _TAILNET_V6)


def is_virtual(interface: str) -> bool:
    """Whether an interface, by its name, leads only to containers or virtual machines of this PC."""
    return _VIRTUAL.match(interface) is not None


@dataclass(frozen=True, slots=True, order=True)
class InterfaceAddress:
    """One address of one interface of this PC, as the system lists it."""

    interface: str
    address: str
    """With its network: `192.168.1.5/24`, `fe80::1%eth0/64`."""

    @property
    def network(self) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
        """The address and its network; ValueError where the text is neither."""
        return ipaddress.ip_interface(self.address)


# --- what a node tells of itself --------------------------------------------------------------------------------------


class _Kind(IntEnum):
    """In the order in which a node names its own addresses."""

    LAN_V4 = 0
    GLOBAL_V4 = 1
    ULA = 2
    GLOBAL_V6 = 3
    TAILNET = 4
    LINK_LOCAL_V4 = 5
    """Two PCs on one cable without DHCP."""
    VIRTUAL = 6


def _kind(interface: str, ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> _Kind | None:
    """None: not to be told to others."""
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast:
        return None
    if ip.version == 6 and ip.is_link_local:
        return None  # it means something only together with an interface of the PC that uses it
    if is_virtual(interface):
        return _Kind.VIRTUAL
    if is_tailnet(ip):
        return _Kind.TAILNET
    if ip.version == 6:
        return _Kind.ULA if ip.is_private else _Kind.GLOBAL_V6
    if ip.is_link_local:
        return _Kind.LINK_LOCAL_V4
    return _Kind.LAN_V4 if ip.is_private else _Kind.GLOBAL_V4


def own_addresses(
    listen_host: str, port: int, interfaces: Iterable[InterfaceAddress], manual: Sequence[str] = ()
) -> tuple[str, ...]:
    """What this node tells others of where it is, best first, at most `MOST_ADVERTISED`.

    `manual` ([mesh] advertise) wins: the operator knows what the PC cannot. A node that listens on one address tells that one. One that
    listens on all (0.0.0.0; `::`, IPv6 only) tells all but loopback, those of container bridges last; loopback only where there is
    nothing else, so that nodes on a PC without a network find each other.
    """
    if manual:
        return tuple(dict.fromkeys(str(parse(address)) for address in manual))
    try:
        listens = ipaddress.ip_address(listen_host)
    except ValueError:
        return (join(listen_host, port),)
    if not listens.is_unspecified:
        return (join(listen_host, port),)
    found: list[tuple[_Kind, InterfaceAddress, str]] = []
    for each in sorted(set(interfaces)):
        ip = each.network.ip
        kind = _kind(each.interface, ip) if ip.version == listens.version else None
        if kind is not None:
            found.append((kind, each, join(str(ip), port)))
    found.sort(key=lambda entry: entry[0])
    chosen: list[str] = []
    told: dict[tuple[_Kind, str], int] = {}
    for kind, each, address in found:
        told[kind, each.interface] = told.get((kind, each.interface), 0) + 1
        if told[kind, each.interface] <= MOST_OF_A_KIND:
            chosen.append(address)
    return tuple(chosen[:MOST_ADVERTISED]) or (join("127.0.0.1" if listens.version == 4 else "::1", port),)


# --- in which order another node tries them ---------------------------------------------------------------------------


class Reach(IntEnum):
    """How likely a viewer is to reach an address directly; smaller is tried first."""

    MANUAL = 0
    """The viewer's own operator named it."""
    SAME_NETWORK = 1
    TAILNET = 2
    """Both are on one; also any host's name, which only an operator can have given."""
    ROUTED = 3
    UNLIKELY = 4
    """No such family here, a tailnet without being on one, another PC's loopback, a link-local address without an interface."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """A node as it looks at others: the networks that it is on. Without any it knows nothing and judges nothing."""

    networks: tuple[ipaddress.IPv4Interface | ipaddress.IPv6Interface, ...] = ()

    @classmethod
    def of(cls, interfaces: Iterable[InterfaceAddress]) -> Viewer:
        """From this PC's interfaces. Container bridges are left out: every Docker host is on a 172.17.0.0/16 of its own."""
        real = [each.network for each in sorted(set(interfaces)) if not is_virtual(each.interface)]
        beyond = [each for each in real if not each.ip.is_loopback]
        return cls(tuple(beyond or real))

    def reach(self, endpoint: Endpoint) -> Reach:
        """How this viewer would get there."""
        ip = endpoint.ip
        if ip is None:
            return Reach.TAILNET
        if not self.networks:
            return Reach.ROUTED
        if ip.version == 6 and ip.is_link_local:
            return Reach.SAME_NETWORK if endpoint.scope else Reach.UNLIKELY
        if any(ip.version == mine.version and ip in mine.network for mine in self.networks):
            return Reach.SAME_NETWORK
        if ip.is_loopback:
            return Reach.UNLIKELY
        if is_tailnet(ip):
            return Reach.TAILNET if any(is_tailnet(mine.ip) for mine in self.networks) else Reach.UNLIKELY
        if ip.is_link_local:
            return Reach.UNLIKELY
        routable = any(mine.version == ip.version and not mine.ip.is_link_local for mine in self.networks)
        return Reach.ROUTED if routable else Reach.UNLIKELY


class Source(IntEnum):
    """Who named an address; the smaller one is kept where several did."""

    MANUAL = 0
    """This node's operator ([mesh] seeds, --join)."""
    ADVERTISED = 1
    """The peer itself, by gossip."""
    SEEN = 2
    """Multicast, or where a connection came from."""


@dataclass(slots=True)
class _Known:
    endpoint: Endpoint
    source: Source
    order: int
    seen_at: float
    failures: int = 0
    failed_at: float = 0.0
    trusted_at: float | None = None

    def fails(self, now: float) -> bool:
        seconds = min(FAILURE_SECONDS * 2.0 ** min(self.failures - 1, 16), LONGEST_FAILURE_SECONDS)
        return self.failures > 0 and now < self.failed_at + seconds

    def trusted(self, now: float) -> bool:
        return self.trusted_at is not None and now < self.trusted_at + TRUST_SECONDS


class PeerAddresses:
    """The addresses of one peer, ranked by what a viewer can reach and by what happened there. Times are seconds of one monotonic clock.

    An address that failed goes behind the others for `FAILURE_SECONDS`, twice as long with each failure in a row; one that answered
    goes before those that were not tried, for `TRUST_SECONDS` from its first answer on, so that a better one is tried again then.
    Among equals: what the viewer reaches more directly (`Reach`), then the order in which the peer named them.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def manual(self, addresses: Sequence[str], now: float) -> None:
        """The operator of this node named these for the peer, best first; they stay."""
        self._learn(addresses, Source.MANUAL, now)

    def advertised(self, addresses: Sequence[str], now: float) -> None:
        """The peer named these of itself, best first; they take the place of those that it named before."""
        named = self._learn(addresses, Source.ADVERTISED, now)
        for key, known in list(self._known.items()):
            if known.source is Source.ADVERTISED and key not in named:
                if known.trusted(now):
                    known.source = Source.SEEN  # it works, whatever the peer knows of it
                else:
                    del self._known[key]

    def seen(self, address: str, now: float) -> None:
        """Somebody else says that the peer is there, or a connection of it came from there."""
        self._learn((address,), Source.SEEN, now)

    def succeeded(self, address: str, now: float) -> None:
        """The peer itself answered at this address."""
        known = self._find(address)
        if known is None:
            self.seen(address, now)
            known = self._find(address)
            if known is None:
                return
        known.failures = 0
        known.seen_at = now
        if not known.trusted(now):
            known.trusted_at = now

    def failed(self, address: str, now: float) -> None:
        """Nobody, or somebody else, answered at this address."""
        known = self._find(address)
        if known is None:
            return
        if now > known.failed_at + 2 * LONGEST_FAILURE_SECONDS:
            known.failures = 0  # what was long ago does not make this one last longer
        known.failures += 1
        known.failed_at = now
        known.trusted_at = None

    def forgive(self) -> None:
        """This node's own network changed: what failed before may work now."""
        for known in self._known.values():
            known.failures = 0
            known.trusted_at = None

    def ranked(self, viewer: Viewer, now: float) -> tuple[str, ...]:
        """Every address that is worth trying, best first; those that failed lately come last, the one that failed longest ago first."""
        for key, known in list(self._known.items()):
            if known.source is Source.SEEN and now > known.seen_at + SEEN_SECONDS:
                del self._known[key]

        def place(known: _Known) -> tuple[bool, float, bool, int, int, str]:
            fails = known.fails(now)
            reach = Reach.MANUAL if known.source is Source.MANUAL else viewer.reach(known.endpoint)
            return (
                fails,
                known.failed_at if fails else 0.0,
                not known.trusted(now),
                reach,
                known.order,
                str(known.endpoint),
            )

        return tuple(str(known.endpoint) for known in sorted(self._known.values(), key=place))

    def _find(self, address: str) -> _Known | None:
        try:
            return self._known.get(str(parse(address)))
        except ValueError:
            return None

    def _learn(self, addresses: Sequence[str], source: Source, now: float) -> set[str]:
        """What is no address is left out: peers say what they like. The keys of those that were taken."""
        taken: set[str] = set()
        for order, address in enumerate(addresses[:MOST_KNOWN]):
            try:
                endpoint = parse(address)
            except ValueError:
                continue
            key = str(endpoint)
            taken.add(key)
            known = self._known.get(key)
            if known is None:
                self._known[key] = _Known(endpoint, source, order, now)
            else:
                known.seen_at = now
                if source <= known.source:
                    known.source, known.order = source, order
        self._bound()
        return taken

    def _bound(self) -> None:
        """The least worth keeping go: never tried before answered, what others saw before what the peer said, the oldest first."""

        def worthless(known: _Known) -> tuple[bool, bool, int, float, int, str]:
            operators = known.source is Source.MANUAL
            return (
                not operators,
                known.trusted_at is None,
                known.source,
                -known.seen_at,
                known.order,
                str(known.endpoint),
            )

        for known in sorted(self._known.values(), key=worthless)[MOST_KNOWN:]:
            del self._known[str(known.endpoint)]
