"""How copies of the map become the same, and what that costs."""

import itertools
import math
import random

import pytest

from tars.core.mesh_messages import Compare, News, Record, Stamp, Want
from tars.core.reconciliation import (
    BULK,
    COMPARE_SECONDS,
    FEW_RECORDS,
    MOST_PACKETS,
    MOST_RUMOURS,
    PACKET_BYTES,
    Packet,
    Reconciliation,
    record_size,
)
from tars.core.records import Member, NodeAdvert, Wish
from tars.core.replicated_map import RANGES, ReplicatedMap, range_of
from tars.core.types import Deployment, ModelEntry, ModelKind, NodeId, NodeSnapshot

NOW = 1_700_000_000_000


class Side:
    """A map and its reconciliation, as the mesh's machine uses them."""

    def __init__(self, name):
        self.map = ReplicatedMap(NodeId(name))
        self.reconciliation = Reconciliation(self.map)

    def write(self, model, replicas=1, at=NOW, note=True):
        record = self.map.put(f"deployment/{model}", Wish(Deployment(model, replicas)), at)
        if note:
            self.reconciliation.note([record])
        return record

    def take(self, packet):
        self.reconciliation.note(self.map.merge(packet.records, NOW))
        answers = self.reconciliation.handle(packet.body) if isinstance(packet.body, (Compare, Want)) else []
        assert len(answers) <= 2 * MOST_PACKETS
        return answers


def compare(asker, asked, now):
    """One comparison to its end: (exchanges, packets). An exchange is what one side sends at once, and what comes back at once."""
    question = asker.reconciliation.compare(asked.map.root, now)
    if question is None:
        return 0, []
    sent, packets = [(asked, asker, Packet(question))], []
    for legs in itertools.count(1):
        assert legs < 50, "they never stop answering each other"
        packets += [packet for _, _, packet in sent]
        sent = [(back, to, answer) for to, back, packet in sent for answer in to.take(packet)]
        if not sent:
            break
    return math.ceil(legs / 2), packets


def size(packet):
    stamps = len(packet.body.have) * 130 if isinstance(packet.body, Want) else 0
    return sum(map(record_size, packet.records)) + stamps


# --- rumours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peers", "times"), [(1, 3), (2, 6), (7, 9), (1_000, 30)])
def test_a_rumour_is_told_as_often_as_it_takes_to_reach_everybody(peers, times):
    side = Side("a")
    record = side.write("m")
    assert [side.reconciliation.rumours(peers) for _ in range(times + 1)] == [(record,)] * times + [()]
    assert side.reconciliation.pending == 0


def test_without_peers_nothing_is_told_and_nothing_forgotten():
    side = Side("a")
    record = side.write("m")
    assert side.reconciliation.rumours(0) == ()
    assert side.reconciliation.rumours(1) == (record,)


def test_the_least_told_comes_first_and_of_those_the_freshest():
    side = Side("a")
    first = side.write("first")
    only_one = record_size(first)
    assert side.reconciliation.rumours(9, only_one) == (first,)
    second, third = side.write("second"), side.write("third")
    assert side.reconciliation.rumours(9, only_one) == (third,)
    assert side.reconciliation.rumours(9, only_one) == (second,)
    assert len(side.reconciliation.rumours(9, 100_000)) == 3


def test_what_was_overwritten_is_told_no_longer():
    side = Side("a")
    side.write("m")
    side.reconciliation.rumours(9)
    newer = side.write("m", 2)
    assert side.reconciliation.rumours(9) == (newer,)
    assert side.reconciliation.pending == 1


def test_what_vanished_is_told_no_longer():
    side = Side("a")
    advert = side.map.put("node/a", NodeAdvert(NodeSnapshot(NodeId("a"), "pc")), NOW)
    removed = side.map.put("member/a", Member(NodeId("a"), "pc", "f", removed=True), NOW)
    side.reconciliation.note([advert, removed])
    assert side.reconciliation.rumours(9) == (removed,)


def large(model):
    return Wish(Deployment(model), ModelEntry(model, ModelKind.CHAT, (), description="x" * 20_000))


def test_rumours_stay_in_their_bytes_but_a_large_one_comes_alone():
    side = Side("a")
    huge = side.map.put("deployment/huge", large("huge"), NOW)
    side.reconciliation.note([huge])
    small = [side.write(f"m{number}") for number in range(20)]
    told = side.reconciliation.rumours(3, 2_000)
    assert 0 < sum(map(record_size, told)) <= 2_000
    assert huge not in told
    seen = [side.reconciliation.rumours(3, 2_000) for _ in range(60)]
    assert (huge,) in seen
    for record in small:
        assert sum(record in each for each in (told, *seen)) == 6


def test_rumours_are_bounded_and_a_fresh_decision_gets_in():
    side = Side("a")
    for number in range(MOST_RUMOURS + 50):
        side.write(f"m{number}")
    assert side.reconciliation.pending == MOST_RUMOURS
    fresh = side.write("fresh")
    assert side.reconciliation.pending == MOST_RUMOURS
    assert fresh in side.reconciliation.rumours(9, 1_000)


def test_a_bulk_is_left_to_comparison_which_goes_on_at_once():
    side, peer = Side("a"), Side("b")
    peer.write("other", note=False)
    assert side.reconciliation.compare(peer.map.root, 0.0) is not None
    assert side.reconciliation.compare(peer.map.root, 0.1) is None
    side.reconciliation.note([side.write(f"m{number}", note=False) for number in range(BULK)])
    assert side.reconciliation.pending == 0
    assert side.reconciliation.compare(peer.map.root, 0.1) is not None


# --- comparison ---------------------------------------------------------------------------------------------------------


def test_equal_maps_send_nothing():
    here, there = Side("a"), Side("b")
    here.write("m")
    there.map.merge(here.map.records(), NOW)
    assert compare(here, there, 0.0) == (0, [])


def test_differences_either_way_are_settled_in_two_exchanges():
    here, there = Side("a"), Side("b")
    for number in range(100):
        here.write(f"both{number}", note=False)
    there.map.merge(here.map.records(), NOW)
    here.write("only here")
    there.write("only there")
    here.write("both3", 2, NOW + 5)
    there.write("both4", 2, NOW + 5)
    there.map.remove("deployment/both5", NOW + 5)
    exchanges, packets = compare(here, there, 0.0)
    assert exchanges <= 2
    assert here.map.root == there.map.root
    sent = {record.key for packet in packets for record in packet.records}
    assert sent == {f"deployment/{name}" for name in ("only here", "only there", "both3", "both4", "both5")}


def test_only_ranges_that_differ_are_asked_for():
    here, there = Side("a"), Side("b")
    for number in range(FEW_RECORDS + 100):
        here.write(f"m{number}", note=False)
    there.map.merge(here.map.records(), NOW)
    changed = here.write("m7", 2, NOW + 5)
    _, packets = compare(here, there, 0.0)
    (want,) = [packet.body for packet in packets if isinstance(packet.body, Want)]
    assert want.ranges == (range_of(changed.key),)
    assert {range_of(key) for key, _ in want.have} == set(want.ranges)
    assert len(want.have) < 20


def test_a_small_map_compares_few_hashes():
    here, there = Side("a"), Side("b")
    for number in range(200):
        here.write(f"m{number}", note=False)
    question = here.reconciliation.compare(there.map.root, 0.0)
    assert question is not None
    assert len(question.hashes) <= 16


def test_a_comparison_is_begun_only_so_often():
    here, there = Side("a"), Side("b")
    there.write("m")
    assert here.reconciliation.compare(there.map.root, 10.0) is not None
    assert here.reconciliation.compare(there.map.root, 10.0 + COMPARE_SECONDS - 0.01) is None
    assert here.reconciliation.compare(there.map.root, 10.0 + COMPARE_SECONDS) is not None


def test_every_packet_is_bounded_and_what_is_left_comes_with_the_next_comparison():
    here, there = Side("a"), Side("b")
    for number in range(4_000):
        here.write(f"model-with-quite-a-long-name-{number}", note=False)
    rounds = 0
    while here.map.root != there.map.root:
        rounds += 1
        assert rounds < 10
        _, packets = compare(there, here, 0.0)  # no time passes: a bulk lets it go on at once
        assert all(size(packet) <= PACKET_BYTES * 1.1 for packet in packets)
    assert rounds > 1


def test_who_has_nothing_is_sent_everything_without_being_asked():
    here, there = Side("a"), Side("b")
    for number in range(50):
        here.write(f"m{number}", note=False)
    exchanges, packets = compare(there, here, 0.0)
    assert exchanges == 1
    assert not any(isinstance(packet.body, Want) for packet in packets)
    assert here.map.root == there.map.root


def test_a_single_large_record_still_travels():
    here, there = Side("a"), Side("b")
    here.map.put("deployment/huge", Wish(Deployment("huge"), large("huge").entry), NOW)
    here.map.put("deployment/huge2", Wish(Deployment("huge2"), large("huge2").entry), NOW)
    compare(here, there, 0.0)
    assert here.map.root == there.map.root


def test_a_removed_member_wins_whoever_asks():
    """Its record has the older stamp, which a comparison of stamps alone would never send."""
    for first in (0, 1):
        sides = [Side("a"), Side("b")]
        sides[0].map.put("member/c", Member(NodeId("c"), "pc", "f", removed=True), NOW)
        sides[1].map.put("member/c", Member(NodeId("c"), "pc", "f"), NOW + 1_000)
        compare(sides[first], sides[1 - first], 0.0)
        assert sides[0].map.root == sides[1].map.root
        member = sides[1].map.get("member/c")
        assert isinstance(member, Member)
        assert member.removed


def test_what_the_other_side_cannot_take_costs_one_bounded_comparison():
    """A stamp that one side refuses as damaged: they differ for ever, and still end each comparison."""
    here, there = Side("a"), Side("b")
    here.map.merge([Record("deployment/m", Stamp(NOW + 10**11, 0, NodeId("a")), Wish(Deployment("m")))], NOW + 10**11)
    for now in (0.0, 100.0):
        assert compare(here, there, now)[0] <= 2
        assert compare(there, here, now)[0] <= 2
    assert there.map.refusals > 0


@pytest.mark.parametrize(
    "body",
    [
        Compare(99, ((1, 2),)),
        Compare(-1, ()),
        Compare(8, ((10**9, 5), (-3, 5))),
        Want((RANGES + 5, -1), ()),
        Want((), (("no such key", Stamp(0, 0, NodeId(""))),)),
        Want((), ()),
    ],
)
def test_a_question_out_of_bounds_is_answered_with_nothing(body):
    assert Side("a").reconciliation.handle(body) == []


@pytest.mark.slow
def test_a_partition_of_thousands_of_changed_keys_heals_in_a_few_rounds():
    dice = random.Random(4)
    sides = [Side(f"n{number}") for number in range(10)]
    halves = sides[:5], sides[5:]
    for half, at in zip(halves, (NOW, NOW + 1), strict=True):
        for number in range(1_200):
            half[0].write(f"m{number}" if number < 200 else f"{at}-{number}", at % 7, at, note=False)
        for other in half[1:]:
            other.map.merge(half[0].map.records(), NOW)
    rounds, sent = 0, 0
    while len({side.map.root for side in sides}) > 1:
        rounds += 1
        assert rounds <= 8
        for side in sides:
            peer = dice.choice([each for each in sides if each is not side])
            sent += sum(size(packet) for packet in compare(side, peer, rounds * COMPARE_SECONDS)[1])
    assert len(sides[0].map) == 2_200
    # Each of the ten needs about 1,100 records on average once; stamps, and answers that cross, may double that.
    needed = 10 * 1_100 * max(record_size(record) for record in sides[0].map.records())
    assert sent < 3 * needed


def test_nothing_is_sent_in_a_mesh_where_nothing_changes():
    """However many nodes: the cost is the root in each envelope."""
    sides = [Side(f"n{number}") for number in range(50)]
    for side in sides:
        side.map.put(f"node/{side.map.node}", NodeAdvert(NodeSnapshot(side.map.node, "pc")), NOW)
    everything = [record for side in sides for record in side.map.records()]
    for side in sides:
        side.map.merge(everything, NOW)
    for one, other in itertools.permutations(sides[:10], 2):
        assert one.reconciliation.rumours(49) == ()
        assert compare(one, other, 0.0) == (0, [])


def test_a_rumour_alone_reaches_nearly_everybody():
    dice = random.Random(7)
    sides = [Side(f"n{number}") for number in range(100)]
    sides[0].write("m")
    for _ in range(30):
        for side in sides:
            records = side.reconciliation.rumours(99)
            if records:
                peer = dice.choice(sides)
                peer.take(Packet(News(), records))
    assert sum(side.map.get("deployment/m") is not None for side in sides) == 100
