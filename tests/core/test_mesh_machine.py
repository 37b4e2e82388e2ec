"""Whole machines together, on virtual time: detection, false deaths, cost, healing as promised; and records that travel with it."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_in_memory import EPOCH_MS, Network, name

from tars.core.coordinator_choice import Candidate, coordinator_of
from tars.core.mesh_events import (
    Changed,
    CoordinatorChanged,
    Drain,
    Leave,
    Loaded,
    LoadHeard,
    MemberChanged,
    Readdressed,
    Received,
    RecordsChanged,
    Seed,
    Send,
    Stalled,
    Tick,
)
from tars.core.mesh_machine import MeshMachine, MeshSettings
from tars.core.mesh_messages import Ack, Envelope, MemberState, News, Ping, Update
from tars.core.records import ClientKey, Member, NodeAdvert
from tars.core.replicated_map import KEY, MEMBER, NODE, ReplicatedMap
from tars.core.types import NodeSnapshot

ALIVE, SUSPECT, DEAD, DRAINING, LEFT = (
    MemberState.ALIVE,
    MemberState.SUSPECT,
    MemberState.DEAD,
    MemberState.DRAINING,
    MemberState.LEFT,
)


def deaths(network, since=0.0):
    return [(at, by, change.node) for at, by, change in network.changes if change.after is DEAD and at >= since]


def detection(count, seed, **network):
    """Seconds from a crash until every other node knows; asserts that nobody else was held for dead."""
    mesh = Network(count, seed, **network)
    mesh.run(3.0 + mesh.dice.random())
    assert deaths(mesh) == []
    victim, crashed = mesh.dice.randrange(count), mesh.now
    mesh.crash(name(victim))
    left = {name(number) for number in range(count)} - {name(victim)}
    seen = 0

    def all_know():
        nonlocal seen
        for _, by, change in mesh.changes[seen:]:
            if change.node == name(victim) and change.after is DEAD:
                left.discard(by)
        seen = len(mesh.changes)
        return not left

    assert mesh.run(20, all_know)
    assert {node for _, _, node in deaths(mesh)} == {name(victim)}
    return mesh.now - crashed


def percentile(values, part):
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


# --- detection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "loss", "runs"), [(2, 0.0, 20), (2, 0.1, 10), (3, 0.0, 10), (10, 0.0, 5), (10, 0.1, 2)]
)
def test_a_dead_node_is_known_to_all_within_five_seconds(count, loss, runs):
    seconds = [detection(count, seed, loss=loss) for seed in range(runs)]
    assert percentile(seconds, 0.99) < 5.0
    assert percentile(seconds, 0.5) < 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "loss", "runs"),
    [
        (2, 0.1, 200),
        (3, 0.1, 100),
        (10, 0.0, 100),
        (10, 0.1, 40),
        (100, 0.0, 6),
        (100, 0.1, 2),
        (300, 0.0, 1),
        (1000, 0.0, 1),
    ],
)
def test_a_dead_node_of_many_is_known_to_all_within_five_seconds(count, loss, runs):
    assert percentile([detection(count, seed, loss=loss) for seed in range(runs)], 0.99) < 5.0


def test_a_killed_process_on_a_living_pc_is_known_sooner():
    assert percentile([detection(10, seed, refuses=True) for seed in range(3)], 0.99) < 4.0


# --- no false deaths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [2, 3, pytest.param(10, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.slow)]
)
def test_a_node_that_stands_still_for_two_seconds_now_and_then_is_not_dead(count):
    for seed in range(4):
        mesh = Network(count, seed)
        mesh.run(2)
        for _ in range(6):
            mesh.pause(name(seed % count), 2.0)
            mesh.run(2.0 + 3 * mesh.dice.random())
        mesh.run(3)
        assert deaths(mesh) == []
        assert all(each.state is ALIVE for each in mesh.machines[name((seed + 1) % count)].view().members.values())


@pytest.mark.parametrize(("count", "seconds"), [(2, 100), (10, 15)])
def test_a_tenth_of_all_packets_may_be_lost(count, seconds):
    mesh = Network(count, 7, loss=0.1)
    mesh.run(seconds)
    assert deaths(mesh) == []


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seconds"), [(2, 3600), (10, 300), (40, 60), (100, 20)])
def test_a_tenth_of_all_packets_may_be_lost_for_long(count, seconds):
    mesh = Network(count, 11, loss=0.1)
    mesh.run(seconds)
    assert deaths(mesh) == []


def test_slow_links_are_no_deaths():
    """Through a tailnet's relay: 100 to 250 ms each way, so that many an answer comes after others were asked."""
    mesh = Network(6, 3, delay=lambda dice: dice.uniform(0.1, 0.25))
    mesh.run(20)
    assert deaths(mesh) == []


TROUBLES = given(
    count=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    troubles=st.lists(
        st.tuples(st.sampled_from(["pause", "restart", "cut", "drain"]), st.integers(0, 5), st.floats(0.1, 6.0)),
        max_size=5,
    ),
    loss=st.sampled_from([0.0, 0.05, 0.2]),
)


@settings(max_examples=8, deadline=None)
@TROUBLES
def test_whatever_happened_soon_after_all_live_nodes_see_each_other_alive(count, seed, troubles, loss):
    settled(count, seed, troubles, loss)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@TROUBLES
def test_whatever_happened_in_hundreds_of_ways(count, seed, troubles, loss):
    settled(count, seed, troubles, loss)


def settled(count, seed, troubles, loss):
    """No live, reachable node is held for dead longer than 20 s, and all name one coordinator."""
    mesh = Network(count, seed, loss=loss)
    mesh.run(1)
    for trouble, number, seconds in troubles:
        node = name(number % count)
        match trouble:
            case "pause":
                mesh.pause(node, seconds)
            case "restart":
                old = mesh.crash(node)
                mesh.run(seconds)
                mesh.start(node, old.records)
            case "cut":
                mesh.cut = lambda sender, to, node=node: node in (sender, to)
            case "drain":
                mesh.tell(node, Drain(seconds > 3))
        mesh.run(seconds)
    mesh.cut = lambda sender, to: False
    mesh.loss = 0.0
    mesh.run(20)
    for machine in mesh.machines.values():
        assert {each.state for each in machine.view().members.values()} <= {ALIVE, DRAINING}
    assert len({machine.view().coordinator for machine in mesh.machines.values()}) == 1
    assert not any(machine.view().isolated for machine in mesh.machines.values())


# --- coming back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [0.3, 10.0])
def test_a_node_that_comes_back_is_back_in_a_second(away):
    mesh = Network(10, 3)
    mesh.run(3)
    old = mesh.crash(name(4))
    mesh.run(away)
    mesh.start(name(4), old.records)
    assert mesh.run(1.0, lambda: mesh.all_see(4, ALIVE))
    mesh.run(5)
    assert mesh.all_see(4, ALIVE)


@pytest.mark.parametrize("count", [2, 3, 6, pytest.param(30, marks=pytest.mark.slow)])
def test_halves_of_a_partition_have_a_coordinator_each_and_find_each_other_by_themselves(count):
    mesh = Network(count, 1)
    mesh.run(2)
    half = {name(number) for number in range(count // 2)}
    mesh.cut = lambda sender, to: (sender in half) != (to in half)
    mesh.run(25)
    for node, machine in mesh.machines.items():
        mine = half if node in half else set(mesh.machines) - half
        assert machine.view().coordinator == min(mine)
        assert {each.node for each in machine.view().members.values() if each.state is ALIVE} == mine - {node}
    mesh.cut = lambda sender, to: False
    healed = mesh.now
    assert mesh.run(
        10,
        lambda: all(
            each.state is ALIVE for machine in mesh.machines.values() for each in machine.view().members.values()
        ),
    ), mesh.now
    assert {machine.view().coordinator for machine in mesh.machines.values()} == {name(0)}
    mesh.run(10)
    assert [each for each in deaths(mesh, healed) if (each[1] in half) == (each[2] in half)] == []


def test_a_link_that_works_one_way_only_is_helped_by_others():
    mesh = Network(4, 5)
    mesh.cut = lambda sender, to: (sender, to) == (name(0), name(1))
    mesh.run(20)
    assert deaths(mesh) == []


def test_whoever_sees_all_vanish_suspects_itself_and_the_others_do_not_wait_for_it():
    mesh = Network(10, 2)
    mesh.run(2)
    mesh.cut = lambda sender, to: name(3) in (sender, to)
    cut = mesh.now
    mesh.run(4.9)
    assert mesh.machines[name(3)].view().isolated
    assert [each for each in deaths(mesh) if each[1] == name(3)] == []
    assert mesh.all_see(3, DEAD)
    mesh.run(20)
    own = [at - cut for at, by, _ in deaths(mesh) if by == name(3)]
    assert len(own) == 9
    assert min(own) > 5.4
    assert mesh.machines[name(3)].view().coordinator == name(3)


def test_with_one_peer_only_it_behaves_as_usual():
    mesh = Network(2, 2)
    mesh.run(2)
    mesh.cut = lambda sender, to: True
    assert mesh.run(4.0, lambda: mesh.state(0, 1) is DEAD)
    assert not mesh.machines[name(0)].view().isolated


def test_a_leaving_node_is_never_dead_and_is_back_when_it_returns():
    mesh = Network(10, 4)
    mesh.run(2)
    mesh.tell(name(5), Leave())
    mesh.crash(name(5))
    assert mesh.run(1.0, lambda: mesh.all_see(5, LEFT))
    mesh.run(20)
    assert mesh.all_see(5, LEFT)
    assert deaths(mesh) == []
    mesh.start(name(5))
    assert mesh.run(1.0, lambda: mesh.all_see(5, ALIVE))


# --- cost ---------------------------------------------------------------------------------------------------------------


def cost(count, seconds):
    mesh = Network(count, 1)
    mesh.size_of = lambda envelope: len(repr(envelope))
    mesh.run(3)
    mesh.sent.clear()
    mesh.sizes.clear()
    mesh.run(seconds)
    return sum(mesh.sent.values()) / count / seconds, sum(mesh.sizes.values()) / count / seconds


def test_a_nodes_cost_does_not_grow_with_the_mesh():
    messages, size = cost(10, 5)
    many_messages, many_size = cost(40, 2)
    assert messages == pytest.approx(4.0, rel=0.05), "a probe each half second, and as many answers"
    assert many_messages == pytest.approx(messages, rel=0.05)
    assert many_size == pytest.approx(size, rel=0.1)


@pytest.mark.slow
def test_a_nodes_cost_is_the_same_among_ten_and_among_hundreds():
    few, many = cost(10, 20), cost(300, 2)
    assert many == pytest.approx(few, rel=0.1)


# --- records and the coordinator ----------------------------------------------------------------------------------------


def put(mesh, number, key, value):
    machine = mesh.machines[name(number)]
    record = machine.records.put(key, value, EPOCH_MS + int(mesh.now * 1000))
    mesh.tell(name(number), Changed((record,)))


def advert(number, priority=0, draining=False):
    return NodeAdvert(NodeSnapshot(name(number), f"pc {number}", draining=draining, priority=priority))


def test_a_write_is_everywhere_at_once_and_lost_packets_are_made_good():
    for loss, within in [(0.0, 0.5), (0.3, 20.0)]:
        mesh = Network(10, 5, loss=loss)
        mesh.run(2)
        put(mesh, 3, KEY + "x", ClientKey("x", "00"))
        assert mesh.run(within, lambda mesh=mesh: all(each.records.get(KEY + "x") for each in mesh.machines.values()))
        assert any(
            isinstance(effect, RecordsChanged) and effect.keys == (KEY + "x",)
            for _, node, effect in mesh.effects
            if node == name(3)
        )


def test_what_was_written_on_both_sides_of_a_partition_is_one_map_again():
    mesh = Network(6, 5)
    half = {name(number) for number in range(3)}
    mesh.cut = lambda sender, to: (sender in half) != (to in half)
    mesh.run(10)
    for number in range(6):
        put(mesh, number, KEY + f"own-{number}", ClientKey(f"own-{number}", "00"))
        put(mesh, number, KEY + "same", ClientKey("same", f"{number:02}"))
    mesh.run(10)
    mesh.cut = lambda sender, to: False
    assert mesh.run(30, lambda: len({each.records.root for each in mesh.machines.values()}) == 1)
    assert len({str(each.records.get(KEY + "same")) for each in mesh.machines.values()}) == 1
    assert len(mesh.machines[name(0)].records.items(KEY)) == 7


def test_the_highest_priority_coordinates_and_draining_ones_only_when_nobody_else_is_left():
    mesh = Network(3, 5)
    mesh.run(2)

    def coordinators():
        return {machine.view().coordinator for machine in mesh.machines.values()}

    assert coordinators() == {name(0)}
    put(mesh, 2, NODE + name(2), advert(2, priority=7))
    mesh.run(1)
    assert coordinators() == {name(2)}
    assert (name(1), CoordinatorChanged(name(2))) in [(node, effect) for _, node, effect in mesh.effects]
    put(mesh, 2, NODE + name(2), advert(2, priority=7, draining=True))
    mesh.run(1)
    assert coordinators() == {name(0)}
    mesh.tell(name(0), Drain(True))
    mesh.run(1)
    assert mesh.all_see(0, DRAINING)
    assert coordinators() == {name(1)}
    mesh.tell(name(1), Leave())
    mesh.crash(name(1))
    mesh.run(1)
    assert coordinators() == {name(2)}, "both drain: priority decides"


STATES = st.sampled_from([ALIVE, SUSPECT, DEAD, DRAINING, LEFT])
CHANGES = st.lists(
    st.tuples(st.integers(0, 4), st.one_of(STATES, st.tuples(st.integers(-2, 2), st.booleans()), st.none()))
)


@given(CHANGES)
def test_after_any_changes_the_coordinator_is_the_first_of_all_that_are_there(changes):
    """It looks at all of them only when one changed that comes before the coordinator; here they are always all looked at."""
    machine, candidacies, removed, left = single(1, 2, 3, 4), {}, set(), False
    writers = [machine.records, *(ReplicatedMap(name(number)) for number in range(1, 5))]
    machine.handle(Tick(), 0.0, EPOCH_MS)
    for turn, (number, change) in enumerate(changes, 1):
        node, wall = name(number), EPOCH_MS + turn
        if isinstance(change, tuple):
            candidacies[node] = change
            said = writers[number].put(NODE + node, advert(number, *change), wall)
            machine.records.merge([said], wall)
            event = Changed((said,))
        elif change is None:  # it is removed, for good
            if node in removed | {name(0)}:
                continue
            removed.add(node)
            member = Member(node, "pc", "00", (f"{node}:1",), removed=True)
            event = Changed((machine.records.put(MEMBER + node, member, wall),))
        elif number:
            other = name(number % 4 + 1)  # two changes at once
            updates = (Update(node, turn, change), Update(other, turn, LEFT if turn % 2 else ALIVE))
            event = Received(Envelope(node, turn, News(), updates=updates))
        else:
            left = left or change is LEFT
            event = Leave() if left else Drain(change is DRAINING)
        machine.handle(event, 0.001 * turn, wall)
        there = [node for node, seen in machine.view().members.items() if seen.state not in (DEAD, LEFT)]
        drains = {node for node in there if machine.view().members[node].state is DRAINING}
        if not left:
            there.append(name(0))
            drains |= {name(0)} if machine.state is DRAINING else set()
        wanted = coordinator_of(
            Candidate(node, priority, draining or node in drains)
            for node in there
            for priority, draining in [candidacies.get(node, (0, False))]
        )
        assert machine.view().coordinator == wanted


def test_only_members_count_and_a_removed_one_is_heard_no_more():
    mesh = Network(3, 5)
    mesh.run(2)
    put(mesh, 0, MEMBER + name(2), Member(name(2), "pc 2", "00", removed=True))
    mesh.run(2)
    assert name(2) not in mesh.machines[name(1)].view().members
    assert any(effect == MemberChanged(name(2), ALIVE, None) for _, node, effect in mesh.effects if node == name(1))
    machine, before = mesh.machines[name(1)], len(mesh.machines[name(1)].records)
    other = ReplicatedMap(name(2))
    smuggled = other.put(KEY + "mine", ClientKey("mine", "00"), EPOCH_MS)
    effects = machine.handle(Received(Envelope(name(2), 9, Ping(1), records=(smuggled,))), mesh.now, EPOCH_MS)
    assert [each for each in effects if isinstance(each, Send) and each.to == name(2)] == []
    assert len(machine.records) == before


def test_a_new_member_is_one_for_all_as_soon_as_its_record_is_there():
    mesh = Network(3, 5)
    mesh.run(2)
    newcomer = Member(name(9), "pc 9", "00", (f"{name(9)}:1",))
    put(mesh, 0, MEMBER + name(9), newcomer)
    records = ReplicatedMap(name(9))
    records.merge(mesh.machines[name(0)].records.records(), EPOCH_MS)
    mesh.start(name(9), records)
    assert mesh.run(
        2, lambda: all(name(9) in each.view().members for node, each in mesh.machines.items() if node != name(9))
    )
    mesh.run(1)
    assert {each.state for each in mesh.machines[name(9)].view().members.values()} == {ALIVE}
    assert deaths(mesh) == []


def test_a_seed_alone_brings_an_empty_node_the_whole_map():
    mesh = Network(3, 5)
    mesh.run(2)
    put(mesh, 0, KEY + "x", ClientKey("x", "00"))
    mesh.run(1)
    mesh.crash(name(2))
    empty = mesh.start(name(2), ReplicatedMap(name(2)))
    mesh.run(0.6)
    assert empty.view().members == {}
    mesh.tell(name(2), Seed(f"{name(1)}:1"))
    assert mesh.run(5, lambda: len(empty.view().members) == 2 and bool(empty.records.get(KEY + "x")))


def test_a_removed_node_that_answers_at_a_seed_is_no_guest():
    machine = single()
    machine.records.put(MEMBER + name(5), Member(name(5), "pc", "00", removed=True), EPOCH_MS)
    machine.handle(Tick(), 0.0, EPOCH_MS)
    (ping,) = [each.envelope.body for each in machine.handle(Seed("x:1"), 0.1, EPOCH_MS) if isinstance(each, Send)]
    smuggled = ReplicatedMap(name(5)).put(KEY + "mine", ClientKey("mine", "00"), EPOCH_MS)
    for sender, taken in ((name(5), False), (name(6), True)):
        answer = Envelope(sender, 9, Ack(ping.number), records=(smuggled,))
        machine.handle(Received(answer), 0.2, EPOCH_MS)
        assert (machine.records.get(KEY + "mine") is not None) is taken


def test_addresses_and_queues_travel():
    mesh = Network(3, 5)
    mesh.run(2)
    mesh.tell(name(1), Readdressed(("new:1",)))
    mesh.tell(name(1), Loaded((("r", 1, 2),)))
    mesh.run(1)
    assert mesh.machines[name(0)].view().members[name(1)].addresses == ("new:1", f"{name(1)}:1")
    mesh.run(1)
    assert any(effect == LoadHeard(name(1), (("r", 1, 2),)) for _, _, effect in mesh.effects)


# --- the machine by itself ----------------------------------------------------------------------------------------------


def single(*peers):
    records = ReplicatedMap(name(0))
    for node in (0, *peers):
        records.put(MEMBER + name(node), Member(name(node), "pc", "00", (f"{name(node)}:1",)), EPOCH_MS)
    return MeshMachine(name(0), records, MeshSettings(), random.Random(1))


def test_a_node_alone_coordinates_and_has_little_to_do():
    machine = single()
    assert machine.next_due(5.0) == 5.0
    assert CoordinatorChanged(name(0)) in machine.handle(Tick(), 5.0, EPOCH_MS)
    assert machine.view().coordinator == name(0)
    now, sent = 5.0, 0
    for _ in range(100):
        now = machine.next_due(now)
        sent += len(machine.handle(Tick(), now, EPOCH_MS))
    assert sent == 0
    assert now > 40, "it wakes about twice a second, for probes that it may have to make"


def test_a_late_tick_is_its_own_fault_and_counts_once():
    machine = single(1)
    machine.handle(Tick(), 0.0, EPOCH_MS)
    late = 30.0
    machine.handle(Stalled(late), late, EPOCH_MS)
    machine.handle(Tick(), late, EPOCH_MS)
    machine.handle(Tick(), late, EPOCH_MS)
    assert machine.view().members[name(1)].state is ALIVE
    now = late
    while machine.view().members[name(1)].state is not DEAD:
        now = machine.next_due(now)
        machine.handle(Tick(), now, EPOCH_MS)
    assert now < late + 15, "excused once, not again and again"


def test_the_view_is_one_object_until_something_in_it_changes():
    machine = single(1, 2)
    machine.handle(Tick(), 0.0, EPOCH_MS)
    before = machine.view()
    assert machine.view() is before
    machine.handle(Received(Envelope(name(1), 3, News())), 0.1, EPOCH_MS)
    assert machine.view() is not before
    assert machine.view().members[name(1)].incarnation == 3


def test_since_when_peers_are_alive_is_told_for_the_collection_of_tombstones():
    machine = single(1, 2, 3)
    machine.handle(Tick(), 10.0, EPOCH_MS)
    for node in (1, 2):
        machine.handle(Received(Envelope(name(node), 1, News())), 11.0, EPOCH_MS)
    machine.handle(Received(Envelope(name(2), 2, News(), updates=())), 12.0, EPOCH_MS)
    since = machine.alive_since_ms(20.0, EPOCH_MS)
    assert since == {name(1): EPOCH_MS - 10_000, name(2): EPOCH_MS - 10_000}, "nobody vouches for whom nobody heard"


def test_an_envelope_of_its_own_does_nothing_but_answer_a_seed():
    machine = single(1)
    machine.handle(Tick(), 0.0, EPOCH_MS)
    effects = machine.handle(Received(Envelope(name(0), 0, Ping(4))), 0.1, EPOCH_MS)
    assert [each.envelope.body for each in effects if isinstance(each, Send)] == [Ack(4)]
    assert name(0) not in machine.view().members


def test_the_same_events_give_the_same_effects():
    runs = []
    for _ in range(2):
        mesh = Network(5, 42, loss=0.2)
        mesh.run(10)
        runs.append((Counter(mesh.sent), [(at, node, repr(effect)) for at, node, effect in mesh.effects]))
    assert runs[0] == runs[1]
