"""Multicast DNS: what is announced, what of what is heard is taken, and that nothing that anybody sends does harm.

These run on this PC's loopback; test_discovery_network.py tries several PCs, and avahi.
"""

import asyncio
import logging
import socket
import uuid
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import DNSAddress, DNSOutgoing, DNSPointer, DNSService, DNSText
from zeroconf import const as dns
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from tars.core.addresses import InterfaceAddress
from tars.mesh import discovery as discovery_module
from tars.mesh.discovery import MOST_HEARD, SERVICE_TYPE, Announcement, Discovery, announced_place, read_announcement
from tars.mesh.network_interfaces import Interface

MESH = "0123456789abcdef"
NODE = "6fa459ea-ee8a-4ca4-894e-db77e160355e"
NAME = f"{NODE}.{SERVICE_TYPE}"
LOOPBACK = (Interface("lo", True, (InterfaceAddress("lo", "127.0.0.1/8"),)),)


def interface(name, *addresses, multicast=True):
    return Interface(name, multicast, tuple(InterfaceAddress(name, address) for address in addresses))


# --- what is announced ------------------------------------------------------------------------------------------------


def test_every_interface_that_carries_multicast_is_used_container_bridges_last():
    here = [
        interface("docker0", "172.17.0.1/16"),
        interface("eth0", "192.168.1.5/24", "192.168.1.6/24", "fd00::5/64"),
        interface("lo", "127.0.0.1/8", multicast=False),
        interface("tailscale0", "100.64.0.7/32", "fd7a:115c:a1e0::7/128"),
        interface("wg0", "10.8.0.2/24", multicast=False),
        interface("wlan0", "10.0.0.5/8"),
    ]
    sockets, _, _ = announced_place(here, ())
    assert sockets == ("192.168.1.5", "10.0.0.5", "172.17.0.1")


def test_an_interface_without_ipv4_is_used_by_its_index(monkeypatch):
    monkeypatch.setattr(socket, "if_nametoindex", {"eth0": 7}.__getitem__)
    assert announced_place([interface("eth0", "fe80::5%eth0/64", "fd00::5/64")], ())[0] == (7,)

    def gone(name):
        raise OSError("no interface with this name")

    monkeypatch.setattr(socket, "if_nametoindex", gone)
    assert announced_place([interface("eth0", "fd00::5/64")], ())[0] == ()


def test_a_pc_with_a_hundred_bridges_joins_no_more_groups_than_the_system_lets_it():
    here = [interface(f"veth{number}", f"10.{number}.0.1/24") for number in range(100)] + [
        interface("zz0", "192.168.1.5/24")
    ]
    sockets, _, _ = announced_place(here, ())
    assert sockets[0] == "192.168.1.5"
    assert len(sockets) == 16


@pytest.mark.parametrize(
    ("addresses", "ips", "port"),
    [
        (("192.168.1.5:8001", "100.64.0.7:8001", "[fd00::5]:8001"), ("192.168.1.5", "100.64.0.7", "fd00::5"), 8001),
        (("box.lan:9001", "192.168.1.5:9001", "192.168.1.6:8001"), ("192.168.1.5",), 9001),
        (("127.0.0.1:8001",), (), 0),
        (("box.lan:9001",), (), 0),
        ((), (), 0),
    ],
)
def test_what_is_announced_are_the_addresses_at_the_first_ones_port(addresses, ips, port):
    assert announced_place((), addresses)[1:] == (ips, port)


# --- what is taken of what is heard -----------------------------------------------------------------------------------

TXT = {b"node": NODE.encode(), b"mesh": MESH.encode(), b"version": b"0.4.0"}


def test_a_node_of_this_mesh_is_taken_with_its_addresses_in_a_fixed_order():
    ips = ["fe80::5%eth0", "fd00::5", "192.168.1.6", "192.168.1.5", "192.168.1.5"]
    found = read_announcement(NAME, TXT, 8001, ips, MESH)
    assert found == Announcement(NODE, ("192.168.1.5:8001", "192.168.1.6:8001", "[fd00::5]:8001"), "0.4.0")


def test_link_local_ipv6_is_taken_where_there_is_nothing_else_and_only_with_its_interface():
    assert read_announcement(NAME, TXT, 1, ["fe80::5%3"], MESH).addresses == ("[fe80::5%3]:1",)
    assert read_announcement(NAME, TXT, 1, ["fe80::5"], MESH) is None


@pytest.mark.parametrize(
    ("name", "change", "port", "ips"),
    [
        ("not-a-uuid." + SERVICE_TYPE, {}, 1, ["10.0.0.5"]),
        (NODE.upper() + "." + SERVICE_TYPE, {}, 1, ["10.0.0.5"]),
        (NAME, {b"node": str(uuid.uuid4()).encode()}, 1, ["10.0.0.5"]),
        (NAME, {b"node": b"\xff\xfe"}, 1, ["10.0.0.5"]),
        (NAME, {b"node": None}, 1, ["10.0.0.5"]),
        (NAME, {b"mesh": b"fedcba9876543210"}, 1, ["10.0.0.5"]),
        (NAME, {b"mesh": None}, 1, ["10.0.0.5"]),
        (NAME, {b"mesh": b"\xc3("}, 1, ["10.0.0.5"]),
        (NAME, {}, 0, ["10.0.0.5"]),
        (NAME, {}, None, ["10.0.0.5"]),
        (NAME, {}, 70000, ["10.0.0.5"]),
        (NAME, {}, 1, []),
        (NAME, {}, 1, ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.251", "ff02::fb", "255.255.255.255", "nonsense"]),
    ],
)
def test_what_is_no_node_of_this_mesh_or_leads_nowhere_is_not_taken(name, change, port, ips):
    assert read_announcement(name, {**TXT, **change}, port, ips, MESH) is None


def test_a_version_that_is_none_is_left_out():
    for version in (b"\xff" * 10, b"1.0\n", b"v" * 33, b"", None):
        assert read_announcement(NAME, {**TXT, b"version": version}, 1, ["10.0.0.5"], MESH).version == ""


def test_a_thousand_addresses_are_bounded():
    ips = [f"10.0.{number // 256}.{number % 256}" for number in range(1000)]
    assert len(read_announcement(NAME, TXT, 1, ips, MESH).addresses) == 8


@given(
    st.dictionaries(
        st.sampled_from([b"node", b"mesh", b"version"]) | st.binary(max_size=8), st.none() | st.binary(max_size=300)
    ),
    st.none() | st.integers(-1, 70000),
    st.lists(st.text(max_size=60) | st.ip_addresses().map(str), max_size=20),
)
def test_whatever_is_announced_is_taken_or_left_never_an_error(properties, port, ips):
    found = read_announcement(NAME, properties, port, ips, MESH)
    assert found is None or (found.node == NODE and 0 < len(found.addresses) <= 8)


# --- on the wire ------------------------------------------------------------------------------------------------------


class Sightings:
    """What a node would try, and an event for each change."""

    def __init__(self):
        self.now = {}
        self.most = 0
        self.withdrawals = []
        self.grew = asyncio.Event()

    def discovered(self, key, addresses):
        self.now[key] = tuple(addresses)
        self.most = max(self.most, len(self.now))
        self.grew.set()

    def withdrawn(self, key):
        self.now.pop(key, None)
        self.withdrawals.append(key)
        self.grew.set()

    async def until(self, condition, seconds=10):
        async with asyncio.timeout(seconds):
            while not condition():
                self.grew.clear()
                await self.grew.wait()


class Node:
    """A node's discovery on loopback; change `addresses` or `interfaces`, then `refresh`."""

    def __init__(self, *addresses, mesh=MESH, **options):
        self.id = str(uuid.uuid4())
        self.name = f"{self.id}.{SERVICE_TYPE}"
        self.sightings = Sightings()
        self.addresses = addresses
        self.interfaces = LOOPBACK
        self.discovery = Discovery(
            self.id,
            mesh,
            "0.4.0",
            self.sightings,
            addresses=lambda: self.addresses,
            interfaces=lambda: self.interfaces,
            **{"on_wsl2": lambda: False, **options},
        )

    @asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.discovery.run())
        try:
            yield self
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), task.exception()
            assert not self.discovery.heard


@pytest.mark.slow
async def test_nodes_of_a_mesh_hear_each_other_from_hello_to_goodbye():
    one, two = Node("192.0.2.1:8001", "[2001:db8::1]:8001"), Node("192.0.2.2:8002")
    stranger = Node("192.0.2.3:8003", mesh="fedcba9876543210")
    async with stranger.running(), one.running():
        async with two.running():
            await one.sightings.until(lambda: one.sightings.now == {two.name: ("192.0.2.2:8002",)})
            await two.sightings.until(lambda: two.sightings.now == {one.name: ("192.0.2.1:8001", "[2001:db8::1]:8001")})
            assert two.discovery.heard[one.name].version == "0.4.0"
        await one.sightings.until(lambda: not one.sightings.now)
        assert not stranger.sightings.now


async def test_new_addresses_are_announced_and_replace_the_old_ones():
    one, two = Node(), Node("192.0.2.2:8002")
    async with one.running(), two.running():
        await one.sightings.until(lambda: two.name in one.sightings.now)
        two.addresses = ("192.0.2.22:8002", "192.0.2.33:8002")
        two.discovery.refresh()
        await one.sightings.until(lambda: one.sightings.now == {two.name: ("192.0.2.22:8002", "192.0.2.33:8002")})
        # A node that has nothing to announce hears all the same, and is not heard.
        assert one.name not in two.sightings.now


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
async def test_stopped_while_it_starts_anew_it_leaves_no_socket_open():
    for turns in range(0, 40, 3):
        one = Node("192.0.2.1:8001")
        async with one.running():
            await asyncio.sleep(0.01)
            one.addresses = ("192.0.2.2:8001",)
            one.discovery.refresh()
            for _ in range(turns):
                await asyncio.sleep(0)
        assert one.discovery._zeroconf is None


@pytest.mark.parametrize("interfaces", [(), (interface("eth0", "10.0.0.5/8", multicast=False),)])
async def test_without_multicast_there_is_one_line_and_it_starts_when_a_network_comes(interfaces, caplog):
    one, two = Node(sweep_seconds=0.01), Node("192.0.2.2:8002")
    one.interfaces = interfaces
    async with one.running(), two.running():
        await asyncio.sleep(0)
        one.discovery.refresh()
        one.interfaces = LOOPBACK
        await one.sightings.until(lambda: two.name in one.sightings.now)
    assert lines(caplog) == [
        "multicast DNS may not work here (no network interface here carries it); nodes that it does not find are found by "
        "[mesh] seeds and by each other"
    ]


async def test_sockets_that_cannot_be_had_are_one_line(monkeypatch, caplog):
    tried = asyncio.Event()
    attempts = []

    def refuses(interfaces):
        attempts.append(interfaces)
        if len(attempts) >= 3:
            tried.set()
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", refuses)
    async with Node(sweep_seconds=0.01).running():
        await asyncio.wait_for(tried.wait(), 5)
    assert len(lines(caplog)) == 1
    assert "(Address already in use)" in lines(caplog)[0]


async def test_where_ipv6_is_refused_ipv4_is_used(monkeypatch, caplog):
    attempts = []

    def only_v4(interfaces):
        attempts.append(interfaces)
        if any(isinstance(each, int) for each in interfaces):
            raise OSError(97, "Address family not supported by protocol")
        return AsyncZeroconf(interfaces=interfaces)

    monkeypatch.setattr(discovery_module, "AsyncZeroconf", only_v4)
    one, two = Node(), Node("192.0.2.2:8002")
    one.interfaces = (*LOOPBACK, interface("lo", "fd00::5/64"))
    async with two.running(), one.running():
        await one.sightings.until(lambda: two.name in one.sightings.now)
    assert attempts == [["127.0.0.1"], ["127.0.0.1", 1], ["127.0.0.1"]]  # the other node's, then twice this one's
    assert lines(caplog) == []


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  nothing here tells when
            await asyncio.sleep(0.005)


async def test_what_the_library_warns_of_is_the_same_one_line_unless_the_network_changed_meanwhile(caplog):
    one = Node("192.0.2.1:8001", sweep_seconds=0.01)
    library = logging.getLogger("zeroconf")
    async with one.running():
        await asyncio.sleep(0)
        library.warning("Error with socket %d: %s", 7, "Network is unreachable")
        one.addresses = ()
        one.discovery.refresh()
        await until(lambda: one.discovery._place.port == 0 and one.discovery._zeroconf)  # it started anew
        assert lines(caplog) == []
        library.warning("Error with socket %d: %s", 8, "Operation not permitted")
        await until(lambda: lines(caplog))
        library.warning("and again")
        sweeps = asyncio.get_running_loop().time() + 0.05
        await until(lambda: asyncio.get_running_loop().time() > sweeps)  # five more sweeps
    assert len(lines(caplog)) == 1
    assert "(Error with socket 8: Operation not permitted)" in lines(caplog)[0]
    library.warning("not ours any longer")
    assert lines(caplog)[-1] == "not ours any longer"


async def test_under_wsl2_it_is_said_that_it_may_not_work(caplog):
    async with Node(on_wsl2=lambda: True).running():
        await asyncio.sleep(0)
    assert len(lines(caplog)) == 1
    assert "WSL2" in lines(caplog)[0]


# --- what anybody may send --------------------------------------------------------------------------------------------


@asynccontextmanager
async def sender():
    """Somebody else's multicast DNS on the same network."""
    multicast = AsyncZeroconf(interfaces=["127.0.0.1"])
    try:
        await multicast.zeroconf.async_wait_for_start()
        yield multicast
    finally:
        await multicast.async_close()


async def announces(multicast, name, txt, port=8001, ips=("192.0.2.9",)):
    service = AsyncServiceInfo(
        SERVICE_TYPE, name, port=port, properties=txt, server=f"{uuid.uuid4()}.local.", parsed_addresses=list(ips)
    )
    await (await multicast.async_register_service(service, cooperating_responders=True, strict=False))


@pytest.mark.slow
async def test_absurd_announcements_are_left_and_the_next_good_one_is_taken(caplog):
    one, good = Node("192.0.2.1:8001"), Node("192.0.2.2:8002")
    absurd = str(uuid.uuid4())
    async with one.running(), sender() as multicast:
        await asyncio.gather(
            announces(multicast, f"{absurd}.{SERVICE_TYPE}", b"\xff\xff\x00\x05a"),
            announces(multicast, f"{uuid.uuid4()}.{SERVICE_TYPE}", {"node": b"\xff", "mesh": MESH}),
            announces(multicast, f"{uuid.uuid4()}.{SERVICE_TYPE}", {"node": absurd, "mesh": MESH}),
            announces(multicast, f"My printer.{SERVICE_TYPE}", {"node": absurd, "mesh": MESH}),
            announces(multicast, f"{uuid.uuid4()}.{SERVICE_TYPE}", {"mesh": "x" * 200}, port=0),
            # Somebody who says to be this very node.
            announces(multicast, one.name, {"node": one.id, "mesh": MESH}),
        )
        async with good.running():
            await one.sightings.until(lambda: good.name in one.sightings.now)
            assert set(one.sightings.now) == {good.name}
    assert lines(caplog) == []


def flood_packets(count, mesh):
    """Announcements of `count` services that claim to be of `mesh`, ten to a packet, or only names."""
    for start in range(0, count, 10):
        out = DNSOutgoing(dns._FLAGS_QR_RESPONSE | dns._FLAGS_AA)
        for _ in range(start, min(start + 10, count)):
            node = str(uuid.uuid4())
            name, host = f"{node}.{SERVICE_TYPE}", f"{node}.local."
            out.add_answer_at_time(DNSPointer(SERVICE_TYPE, dns._TYPE_PTR, dns._CLASS_IN, 4500, name), 0)
            if mesh:
                text = b"".join(
                    bytes([len(part)]) + part for part in (f"node={node}".encode(), f"mesh={mesh}".encode())
                )
                out.add_answer_at_time(DNSText(name, dns._TYPE_TXT, dns._CLASS_IN, 4500, text), 0)
                out.add_answer_at_time(DNSService(name, dns._TYPE_SRV, dns._CLASS_IN, 120, 0, 0, 8001, host), 0)
                out.add_answer_at_time(DNSAddress(host, dns._TYPE_A, dns._CLASS_IN, 120, bytes([192, 0, 2, 66])), 0)
        yield from out.packets()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, MESH], ids=["names only", "as members"])
async def test_a_flood_of_ten_thousand_services_is_bounded_and_a_good_one_is_still_found(mesh, caplog):
    one, good, most = Node("192.0.2.1:8001", sweep_seconds=0.5), Node("192.0.2.2:8002"), 0
    async with one.running():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            for number, packet in enumerate(flood_packets(10_000, mesh)):
                raw.sendto(packet, ("224.0.0.251", 5353))
                if number % 50 == 0 and (multicast := one.discovery._zeroconf):
                    most = max(most, len(multicast.zeroconf.cache.entries_with_name(SERVICE_TYPE)))
                for _ in range(4):  # as fast as it can be read: what the system drops is no flood
                    await asyncio.sleep(0)
        async with good.running():
            await one.sightings.until(lambda: good.name in one.sightings.now, 6)
            assert most > 1000  # the flood came in
            assert one.sightings.most <= MOST_HEARD
            assert one.sightings.most > 100 if mesh else set(one.discovery.heard) == {good.name}
        assert len(one.discovery._waiting) <= 256
    assert lines(caplog) == []


@pytest.mark.slow
async def test_random_packets_do_no_harm(caplog):
    import random

    dice = random.Random(4)
    one, good = Node("192.0.2.1:8001"), Node("192.0.2.2:8002")
    packets = list(flood_packets(20, MESH))
    unhandled = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
    async with one.running():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            for number in range(3000):
                packet = bytearray(dice.choice(packets))
                for _ in range(dice.randrange(1, 20)):
                    packet[dice.randrange(len(packet))] = dice.randrange(256)
                raw.sendto(packet[: dice.randrange(1, len(packet) + 1)], ("224.0.0.251", 5353))
                if number % 20 == 0:
                    await asyncio.sleep(0)
        async with good.running():
            await one.sightings.until(lambda: good.name in one.sightings.now, 20)
    assert unhandled == []
    assert lines(caplog) == []
