"""The driver on a real loop, over a transport in memory whose addresses can be dead, silent or slow."""

import asyncio
import logging
import random
import time
from dataclasses import replace

import pytest

from tars.core.membership import MembershipSettings
from tars.core.mesh_events import CoordinatorChanged, MemberChanged, RecordsChanged
from tars.core.mesh_machine import MeshMachine, MeshSettings
from tars.core.mesh_messages import Envelope, MemberState, News, Ping
from tars.core.records import ClientKey, Member
from tars.core.replicated_map import KEY, MEMBER
from tars.core.types import NodeId
from tars.errors import NotAMember, PeerUnreachable
from tars.mesh.gossip import Gossip, GossipSettings
from tars.mesh.replicated_store import MemoryStore

FAST = MembershipSettings.paced(0.05)
A, B, C = (NodeId(each) for each in "abc")


class Store(MemoryStore):
    """A store without a disk that notes what it was asked to save."""

    def __init__(self, node):
        super().__init__(node)
        self.saved, self.contacts = [], 0

    def changed(self, keys):
        self.saved += keys

    def contact(self):
        self.contacts += 1

    def collect(self, alive_since_ms):
        return []


class Wire:
    """Addresses of the shape `<node>:<port>`. `refused` and `silent` ones answer with an error or never."""

    def __init__(self):
        self.nodes, self.refused, self.silent, self.tried, self.waiting = {}, set(), set(), [], 0

    def transport(self, sender):
        wire = self

        class Transport:
            async def exchange(self, address, expected, envelope):
                wire.tried.append((sender, address))
                await asyncio.sleep(0)
                if address in wire.silent:
                    wire.waiting += 1
                    try:
                        await asyncio.Event().wait()
                    finally:
                        wire.waiting -= 1
                node = NodeId(address.partition(":")[0])
                if address in wire.refused or node not in wire.nodes or (expected not in (None, node)):
                    raise PeerUnreachable(f"nobody at {address}")
                return node, wire.nodes[node].handle(sender, envelope)

        return Transport()


class Mesh:
    def __init__(self):
        self.wire, self.tasks, self.stores, self.notices = Wire(), {}, {}, {}
        self.recorded = {}

    def add(self, node, known, *, addresses=None, settings=None, **more):
        store = self.stores[node] = Store(node)
        writer = Store(A).map
        store.map.merge(
            [
                writer.put(MEMBER + each, Member(each, each, "00", self.recorded.get(each, (f"{each}:1",))), 1_000)
                for each in known
            ],
            1_000,
        )
        machine = MeshMachine(
            node, store.map, MeshSettings(FAST, addresses or (f"{node}:1",), gossip_seconds=0.02), random.Random(1)
        )
        gossip = Gossip(
            machine, self.wire.transport(node), store, settings=settings or GossipSettings(exchange=0.5), **more
        )
        self.notices[node] = []
        gossip.listen(self.notices[node].append)
        self.wire.nodes[node] = gossip
        self.tasks[node] = asyncio.create_task(gossip.run())
        return gossip

    async def kill(self, node):
        self.wire.nodes.pop(node)
        self.tasks[node].cancel()
        await asyncio.gather(self.tasks.pop(node), return_exceptions=True)

    async def until(self, condition, seconds=5.0):
        """Look again and again, with a bound: not every change of a view is a notice."""
        async with asyncio.timeout(seconds):
            while not condition():
                for task in self.tasks.values():
                    assert not task.done(), task
                await asyncio.sleep(0.002)


@pytest.fixture
async def mesh():
    found = Mesh()
    yield found
    for node in list(found.tasks):
        task = found.tasks[node]
        assert not task.done(), "the driver died"
        found.wire.nodes.pop(node, None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not [each for each in asyncio.all_tasks() if each.get_name().startswith("gossip")], (
        "something is left under way"
    )


def state(gossip, node):
    member = gossip.view().members.get(node)
    return None if member is None else member.state


def heard(gossip, node):
    member = gossip.view().members.get(node)
    return member is not None and member.incarnation >= 0


async def test_a_write_reaches_the_others_and_is_given_to_their_store(mesh):
    a, _, _ = (mesh.add(node, (A, B, C)) for node in (A, B, C))
    a.put(KEY + "x", ClientKey("x", "00" * 32))
    await mesh.until(lambda: mesh.stores[B].map.get(KEY + "x") and mesh.stores[C].map.get(KEY + "x"))
    assert KEY + "x" in mesh.stores[B].saved
    assert KEY + "x" not in mesh.stores[A].saved, "it was saved before it counted"
    assert any(isinstance(each, RecordsChanged) and KEY + "x" in each.keys for each in mesh.notices[A])
    assert mesh.stores[B].contacts > 0
    a.remove(KEY + "x")
    await mesh.until(lambda: mesh.stores[C].map.get(KEY + "x") is None)


async def test_a_killed_node_is_dead_and_the_next_one_coordinates(mesh):
    mesh.add(A, (A, B, C))
    b, c = mesh.add(B, (A, B, C)), mesh.add(C, (A, B, C))
    await mesh.until(lambda: heard(b, A) and heard(c, A))
    assert b.view().coordinator == A
    await mesh.kill(A)
    await mesh.until(lambda: state(b, A) is MemberState.DEAD and state(c, A) is MemberState.DEAD)
    assert CoordinatorChanged(B) in mesh.notices[C]
    mesh.add(A, (A, B, C))
    await mesh.until(lambda: state(b, A) is MemberState.ALIVE and state(c, A) is MemberState.ALIVE)


async def test_a_leaving_node_says_so_before_it_goes(mesh):
    a, b = mesh.add(A, (A, B)), mesh.add(B, (A, B))
    await mesh.until(lambda: heard(b, A))
    await a.leave()
    await mesh.kill(A)
    assert state(b, A) is MemberState.LEFT
    assert not [each for each in mesh.notices[B] if isinstance(each, MemberChanged) and each.after is MemberState.DEAD]


async def test_a_farewell_to_a_silent_peer_is_bounded(mesh):
    a = mesh.add(A, (A, B), settings=GossipSettings(exchange=60, farewell=0.05))
    mesh.wire.silent.add("b:1")
    async with asyncio.timeout(2):
        await a.leave()


async def test_a_silent_address_stalls_neither_its_node_nor_others(mesh):
    """B's record names a silent address first: its second one gets a chance after a head start, and goes first from then on."""
    mesh.wire.silent.add("b:9")
    mesh.recorded[B] = ("b:9", "b:1")
    settings = GossipSettings(next_address=0.01, exchange=60)
    b = mesh.add(B, (A, B), addresses=("b:9", "b:1"))
    a = mesh.add(A, (A, B), settings=settings)
    await mesh.until(lambda: heard(a, B) and heard(b, A))
    await mesh.until(lambda: a.addresses(B) == ("b:1", "b:9"), 3)
    assert (A, "b:9") in mesh.wire.tried
    mesh.wire.tried.clear()
    a.put(KEY + "x", ClientKey("x", "00" * 32))
    await mesh.until(lambda: mesh.stores[B].map.get(KEY + "x"))
    assert (A, "b:9") not in mesh.wire.tried


async def test_a_refused_address_is_left_for_the_next_at_once(mesh):
    mesh.wire.refused.add("b:9")
    mesh.recorded[B] = ("b:9", "b:1")
    mesh.add(B, (A, B), addresses=("b:9", "b:1"))
    a = mesh.add(A, (A, B), settings=GossipSettings(next_address=30, exchange=40))
    await mesh.until(lambda: heard(a, B))
    assert state(a, B) is MemberState.ALIVE


async def test_what_is_under_way_to_a_silent_peer_is_bounded(mesh):
    """However often it is told something, no more than its share of exchanges waits for it; the others are told."""
    mesh.wire.silent.add("c:1")
    settings = GossipSettings(exchange=60, exchanges_each=2)
    a, b = mesh.add(A, (A, B, C), settings=settings), mesh.add(B, (A, B), settings=settings)
    await mesh.until(lambda: heard(a, B))
    for number in range(50):
        a.put(KEY + str(number), ClientKey(str(number), "00" * 32))
    await mesh.until(lambda: all(mesh.stores[B].map.get(KEY + str(number)) for number in range(50)))
    assert 0 < mesh.wire.waiting <= 4, "two of each"
    assert heard(b, A)


async def test_a_seed_leads_to_its_node_and_itself_is_no_peer(mesh):
    """A was restored without its records: the seed's answer brings them, and a seed that is its own address does no harm."""
    b = mesh.add(B, (A, B))
    a = mesh.add(A, ())
    a.seed("a:7")
    a.seed("b:1")
    await mesh.until(lambda: B in a.view().members and heard(a, B) and heard(b, A))
    assert A not in a.view().members


async def test_a_packet_in_anothers_name_is_refused(mesh):
    a = mesh.add(A, (A, B, C))
    await asyncio.sleep(0)
    with pytest.raises(NotAMember, match="another node's name"):
        a.handle(B, Envelope(C, 1, News()))
    assert a.view().members[C].incarnation == -1


async def test_a_stranger_gets_no_answer(mesh):
    a = mesh.add(A, (A, B))
    assert a.handle(C, Envelope(C, 1, Ping(1))) == []
    assert [type(each.body).__name__ for each in a.handle(B, Envelope(B, 1, Ping(1)))][:1] == ["Ack"]


async def test_its_queues_go_into_its_answers(mesh):
    a = mesh.add(A, (A, B), load=lambda: (("mistral@a", 2, 7),))
    assert a.handle(B, Envelope(B, 1, Ping(5)))[0].body.load == (("mistral@a", 2, 7),)


async def test_a_listener_that_fails_stops_nothing(mesh, caplog):
    def fails(notice):
        raise RuntimeError("a fault in a listener")

    a = mesh.add(A, (A, B))
    a.listen(fails)
    with caplog.at_level(logging.ERROR):
        a.put(KEY + "x", ClientKey("x", "00" * 32))
    assert "a listener failed on RecordsChanged" in caplog.text
    assert mesh.stores[A].map.get(KEY + "x")


async def test_a_record_that_no_node_takes_is_said(mesh, caplog):
    a = mesh.add(A, (A, B))
    bad = replace(mesh.stores[A].map.put(KEY + "x", ClientKey("x", "00"), 5), key="nonsense/x")
    a.handle(B, Envelope(B, 1, News(), records=(bad,)))
    with caplog.at_level(logging.WARNING):
        a.handle(B, Envelope(B, 1, News()))
    assert "nonsense/x" in caplog.text


@pytest.mark.slow
async def test_a_loop_that_stood_still_accuses_nobody(mesh):
    """The loop is blocked for many probe times with a probe under way: the answer is read before anything is concluded."""
    a, b = mesh.add(A, (A, B)), mesh.add(B, (A, B))
    await mesh.until(lambda: heard(a, B) and heard(b, A))
    for _ in range(2):
        time.sleep(0.3)  # noqa: ASYNC251  # blocking the loop is the point
        await asyncio.sleep(0.02)
    wrong = [
        each
        for node in (A, B)
        for each in mesh.notices[node]
        if isinstance(each, MemberChanged) and each.after in (MemberState.SUSPECT, MemberState.DEAD)
    ]
    assert not wrong


async def test_the_map_must_be_the_stores():
    machine = MeshMachine(A, MemoryStore(A).map, MeshSettings(), random.Random(1))
    with pytest.raises(ValueError, match="share one map"):
        Gossip(machine, Wire().transport(A), Store(A))
