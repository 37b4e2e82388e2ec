"""The map that is the same on every node."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.mesh_messages import Record, Stamp
from tars.core.records import ClientKey, MeasuredLoad, Member, NodeAdvert, Orders, Wish
from tars.core.replicated_map import (
    DEPLOYMENT,
    MOST_KEY_LENGTH,
    RANGES,
    SETTLED_SECONDS,
    TOMBSTONE_SECONDS,
    Refused,
    ReplicatedMap,
    adverts,
    keys,
    measured,
    measured_key,
    members,
    orders_for,
    overrules,
    range_of,
    wishes,
)
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    KvType,
    MemoryEstimate,
    NodeId,
    NodeSnapshot,
    ReplicaId,
    RuntimeSettings,
)

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
NOW = 1_700_000_000_000
DAY = 86_400_000


def wish(model, replicas=1):
    return Wish(Deployment(model, replicas))


def advert(node, name="pc"):
    return NodeAdvert(NodeSnapshot(node, name))


def member(node, removed=False, name="pc"):
    return Member(node, name, "f1", removed=removed)


def same(*maps):
    return all(
        sorted(each.records(), key=lambda r: r.key) == sorted(maps[0].records(), key=lambda r: r.key) for each in maps
    )


# --- the algebra --------------------------------------------------------------------------------------------------------

NODES = st.sampled_from([A, B, C])
STAMPS = st.builds(Stamp, st.integers(NOW, NOW + 2), st.integers(0, 1), NODES)


def values(key):
    prefix, _, name = key.partition("/")
    removed = [None] if prefix != "member" else []
    return {
        "node": [advert(NodeId(name), each) for each in "xy"],
        "member": [member(NodeId(name), removed, each) for removed in (False, True) for each in "xy"],
        "deployment": [wish(name, count) for count in (1, 2)],
        "orders": [Orders(NodeId(name), coordinator) for coordinator in (A, B)],
        "key": [ClientKey(name, digest) for digest in "xy"],
        "unknown": [wish("m")],
    }[prefix] + removed


RECORDS = st.sampled_from(
    [
        "node/a",
        "node/b",
        "member/a",
        "member/b",
        "deployment/m",
        "deployment/n",
        "orders/a",
        "orders/b",
        "key/k",
        "unknown/m",
    ]
).flatmap(lambda key: st.builds(Record, st.just(key), STAMPS, st.sampled_from(values(key))))


@given(st.lists(RECORDS, max_size=12), st.data())
def test_merging_is_commutative_associative_and_idempotent(records, data):
    """In any order, doubled, in one go or by way of other nodes' copies: the same map, with the same hashes."""
    one = ReplicatedMap(A)
    one.merge(records, NOW)
    other = ReplicatedMap(B)
    for record in data.draw(st.permutations(records + records)):
        other.merge([record], NOW)
    cut = data.draw(st.integers(0, len(records)))
    left, right, third = ReplicatedMap(A), ReplicatedMap(B), ReplicatedMap(C)
    left.merge(records[:cut], NOW)
    right.merge(records[cut:], NOW)
    third.merge(right.records(), NOW)
    third.merge(left.records(), NOW)
    assert same(one, other, third)
    assert one.root == other.root == third.root
    assert one.hashes() == other.hashes() == third.hashes()
    assert one.merge(list(one.records()), NOW) == []


@pytest.mark.parametrize("key", ["deployment/m", "member/a", "node/a", "key/k"])
def test_two_writes_with_one_stamp_end_the_same_everywhere(key):
    """No sound node makes them, but one whose folder was copied does."""
    records = [Record(key, Stamp(NOW, 0, A), value) for value in values(key)]
    ends = set()
    for order in itertools.permutations(records):
        each = ReplicatedMap(B)
        each.merge(order, NOW)
        ends.add(repr(each.get(key)))
    assert len(ends) == 1


@given(st.lists(RECORDS, max_size=12))
def test_the_hashes_that_are_kept_up_are_those_of_the_records(records):
    grown = ReplicatedMap(A)
    for record in records:
        grown.merge([record], NOW)
    fresh = ReplicatedMap(B)
    fresh.merge(grown.records(), NOW)
    assert fresh.root == grown.root
    assert (grown.root == 0) == (len(grown) == 0)
    for level in (0, 4, 8):
        hashes = grown.hashes(level)
        assert set(hashes) == {range_of(record.key) >> (8 - level) for record in grown.records()}
        combined = 0
        for value in hashes.values():
            combined ^= value
        assert combined == grown.root
    assert sorted(grown.in_ranges(range(RANGES)), key=lambda r: r.key) == sorted(grown.records(), key=lambda r: r.key)


@given(st.lists(RECORDS, max_size=12))
def test_what_merge_gives_back_is_what_changed(records):
    changing = ReplicatedMap(A)
    for record in records:
        before = changing.record(record.key)
        changed = changing.merge([record], NOW)
        assert changed in ([], [record])
        assert (changing.record(record.key) != before) == bool(changed)


# --- writing and reading ------------------------------------------------------------------------------------------------


def test_a_write_here_is_later_than_all_that_was_heard():
    here = ReplicatedMap(A)
    here.merge([Record("deployment/m", Stamp(NOW + DAY, 7, B), wish("m", 5))], NOW)
    record = here.put("deployment/m", wish("m", 2), NOW)
    assert record.stamp > Stamp(NOW + DAY, 7, B)
    assert here.get("deployment/m") == wish("m", 2)
    here.remove("deployment/m", NOW)
    assert here.get("deployment/m") is None
    assert here.record("deployment/m") is not None
    assert here.items(DEPLOYMENT) == []


def test_a_draft_changes_nothing_until_it_is_merged():
    here = ReplicatedMap(A)
    draft = here.draft("deployment/m", wish("m"), NOW)
    assert (len(here), here.root) == (0, 0)
    assert here.merge([draft], NOW) == [draft]


def test_each_kind_is_found_by_what_it_is():
    here = ReplicatedMap(A)
    load = MeasuredLoad("RTX 3060 12", "m:Q4:5", 4096, 4, 4096, KvType.F16, -1, Bytes(7))
    for key, value in {
        "node/a": advert(A),
        "member/b": member(B),
        "deployment/n": wish("n"),
        "deployment/m": wish("m"),
        "orders/b": Orders(B, A),
        measured_key(load): load,
        "key/k": ClientKey("k", "d"),
    }.items():
        here.put(key, value, NOW)
    assert adverts(here) == {A: advert(A)}
    assert members(here) == {B: member(B)}
    assert list(wishes(here)) == ["m", "n"]
    assert orders_for(here, B) == Orders(B, A)
    assert orders_for(here, A) is None
    assert measured(here) == [load]
    assert keys(here) == {"k": ClientKey("k", "d")}
    assert len(here) == 7


def test_orders_of_another_coordinator_are_told_from_a_nodes_own():
    here, there = ReplicatedMap(A), ReplicatedMap(B)
    here.put("orders/a", Orders(A, A), NOW)
    here.merge([there.put("orders/b", Orders(B, B), NOW)], NOW)
    assert overrules(here, ["orders/a", "orders/b"], A)
    assert overrules(here, ["orders/a", "orders/b"], B)
    assert not overrules(here, ["orders/a", "orders/c", "deployment/b", "node/b"], A)
    here.merge([there.remove("orders/b", NOW + 1)], NOW + 1)
    assert not overrules(here, ["orders/b"], A)


def test_a_measured_load_with_endless_names_still_has_a_key():
    load = MeasuredLoad("c" * 255, "m" * 600, 4096, 4, 4096, KvType.F16, -1, Bytes(7))
    assert len(measured_key(load)) <= MOST_KEY_LENGTH
    assert measured_key(load) != measured_key(replace(load, context=8192))
    ReplicatedMap(A).put(measured_key(load), load, NOW)


# --- what is not taken --------------------------------------------------------------------------------------------------

DEVICE = DeviceSnapshot(DeviceId("b/cpu"), B, DeviceKind.CPU, "cpu", Bytes(5), Bytes(5))
ELSEWHERE = Assignment(
    ReplicaId("m@x#0"), "m", "Q4", DEVICE.id, B, MemoryEstimate(*[Bytes(1)] * 4), RuntimeSettings(512), ""
)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (Record("node/a", Stamp(NOW, 0, B), advert(A)), "only a node itself"),
        (Record("node/a", Stamp(NOW, 0, B), None), "only a node itself"),
        (Record("node/a", Stamp(NOW, 0, A), advert(B)), "holds the record of 'b'"),
        (Record("node/a", Stamp(NOW, 0, A), NodeAdvert(NodeSnapshot(A, "pc", (DEVICE,)))), "of another node"),
        (Record("orders/a", Stamp(NOW, 0, B), Orders(A, C)), "in the name of c"),
        (Record("orders/a", Stamp(NOW, 0, B), Orders(B, B)), "holds the record of 'b'"),
        (Record("member/a", Stamp(NOW, 0, B), None), "only marked as removed"),
        (Record("member/a", Stamp(NOW, 0, B), member(B)), "holds the record of 'b'"),
        (Record("deployment/m", Stamp(NOW, 0, B), wish("n")), "holds the record of 'n'"),
        (Record("deployment/m", Stamp(NOW, 0, B), member(B)), "should hold a Wish"),
        (Record("deployment/", Stamp(NOW, 0, B), wish("")), "needs a name"),
        (Record("deployment/" + "m" * 600, Stamp(NOW, 0, B), wish("m" * 600)), "611 characters"),
        (Record("lease/m", Stamp(NOW, 0, B), wish("m")), "no key"),
        (Record("no prefix", Stamp(NOW, 0, B), None), "no key"),
        (Record("key/k", Stamp(NOW, 0, B), ClientKey("other", "d")), "'other'"),
        (Record("deployment/m", Stamp(NOW + 400 * DAY, 0, B), wish("m")), "set the clocks"),
        (Record("deployment/m", Stamp(NOW, -1, B), wish("m")), "outside what a clock gives"),
    ],
)
def test_what_is_not_valid_is_left_out_and_said(record, said):
    here = ReplicatedMap(A)
    good = Record("deployment/good", Stamp(NOW, 0, B), wish("good"))
    assert here.merge([record, good], NOW) == [good]
    assert here.refusals == 1
    assert said in (here.last_refusal or "")
    # A damaged stamp does not drag the clock along.
    assert here.clock.tick(NOW).wall_ms == NOW


def test_an_advert_that_tells_of_other_nodes_replicas_is_not_taken():
    from tars.core.records import ReplicaReport
    from tars.core.types import ModelKind, ReplicaState

    report = ReplicaReport(ELSEWHERE, ModelKind.CHAT, ReplicaState.READY)
    with pytest.raises(Refused, match="of another node"):
        ReplicatedMap(A).put("node/a", replace(advert(A), replicas=(report,)), NOW)


def test_a_write_that_nobody_would_take_is_refused_here():
    here = ReplicatedMap(A)
    with pytest.raises(Refused, match="only a node itself"):
        here.put("node/b", advert(B), NOW)
    with pytest.raises(Refused, match="only marked as removed"):
        here.remove("member/b", NOW)
    assert len(here) == 0


# --- members that were removed ------------------------------------------------------------------------------------------


def test_a_removed_member_stays_removed_and_what_it_said_vanishes():
    here = ReplicatedMap(A)
    told = ReplicatedMap(B)
    told.put("node/b", advert(B), NOW)
    here.merge(told.records(), NOW)
    here.put("member/b", member(B), NOW)
    here.put("orders/b", Orders(B, A), NOW)
    here.put("member/b", member(B, removed=True), NOW)
    assert (here.get("node/b"), here.get("orders/b")) == (None, None)
    assert here.record("node/b") is None
    assert here.merge([told.put("node/b", advert(B, "again"), NOW + DAY)], NOW) == []
    assert here.merge([told.put("member/b", member(B), NOW + DAY)], NOW) == []
    with pytest.raises(Refused, match="for good"):
        here.put("member/b", member(B), NOW + DAY)
    with pytest.raises(Refused, match="removed from the mesh"):
        here.put("orders/b", Orders(B, A), NOW + DAY)
    told.merge(here.records(), NOW)
    assert same(here, told)
    assert here.root == told.root


# --- tombstones ---------------------------------------------------------------------------------------------------------

LATER = NOW + (TOMBSTONE_SECONDS + SETTLED_SECONDS) * 1000 + 1


def mesh(*nodes):
    """Maps in which these are members, and `deployment/m` was wanted and is removed on the first."""
    maps = [ReplicatedMap(node) for node in nodes]
    for node in nodes:
        maps[0].put(f"member/{node}", member(node), NOW)
    maps[0].put("deployment/m", wish("m"), NOW)
    for each in maps[1:]:
        each.merge(maps[0].records(), NOW)
    maps[0].remove("deployment/m", NOW)
    return maps


def test_a_tombstone_is_kept_for_its_time_and_then_forgotten():
    (here,) = mesh(A)
    root_of_members = ReplicatedMap(A)
    root_of_members.merge([record for record in here.records() if record.key.startswith("member/")], NOW)
    assert here.collect(NOW + TOMBSTONE_SECONDS * 1000, {}) == []
    assert here.collect(LATER, {}) == ["deployment/m"]
    assert here.record("deployment/m") is None
    assert here.root == root_of_members.root


def test_members_and_what_lives_are_never_forgotten():
    here, _ = mesh(A, B)
    here.put("member/b", member(B, removed=True), NOW)
    here.put("deployment/n", wish("n"), NOW)
    assert here.collect(LATER + 900 * DAY, {}) == ["deployment/m"]
    assert here.get("member/b") == member(B, removed=True)
    assert here.get("deployment/n") == wish("n")


@pytest.mark.parametrize(
    ("alive_since", "collected"),
    [
        ({}, False),
        ({B: LATER - SETTLED_SECONDS * 1000}, False),
        ({B: LATER - SETTLED_SECONDS * 1000, C: LATER - 60_000}, False),
        ({B: LATER - SETTLED_SECONDS * 1000, C: NOW}, True),
    ],
    ids=["nobody is alive", "one is away", "one came back just now", "all have been here for an hour"],
)
def test_a_removal_is_forgotten_only_when_everybody_has_heard_it(alive_since, collected):
    here = mesh(A, B, C)[0]
    assert bool(here.collect(LATER, alive_since)) == collected


def test_a_node_that_was_away_for_forty_days_resurrects_nothing():
    here, away = mesh(A, B)
    now = NOW + 40 * DAY
    assert here.collect(now, {}) == []
    away.put("deployment/new", wish("new"), now)
    here.merge(away.records(), now)
    away.merge(here.records(), now)
    assert list(wishes(here)) == list(wishes(away)) == ["new"]
    settled = now + SETTLED_SECONDS * 1000
    assert here.collect(settled, {B: now}) == ["deployment/m"]
    # The other has not collected yet, and tells of the removal once more: it does not come back.
    assert here.merge(away.records(), settled) == []
    assert away.collect(settled, {A: now}) == ["deployment/m"]
    assert same(here, away)


def test_two_halves_that_were_apart_for_forty_days_lose_nothing_and_resurrect_nothing():
    left, right = mesh(A, B)
    right.put("deployment/right", wish("right"), NOW + DAY)
    left.put("deployment/left", wish("left"), NOW + DAY)
    right.put("deployment/gone", wish("gone"), NOW + DAY)
    right.remove("deployment/gone", NOW + DAY)
    now = NOW + 40 * DAY
    assert left.collect(now, {}) == right.collect(now, {}) == []
    left.merge(right.records(), now)
    right.merge(left.records(), now)
    assert same(left, right)
    assert list(wishes(left)) == ["left", "right"]


def test_who_joins_again_forgets_what_the_mesh_has_forgotten_and_brings_what_it_wrote_since():
    former = ReplicatedMap(NodeId("c2"))
    former.put("deployment/m", wish("m"), NOW)
    former.put("deployment/kept", wish("kept"), NOW)
    last_contact = NOW + DAY
    former.put("deployment/own", wish("own"), NOW + 2 * DAY)
    here = mesh(A)[0]
    here.put("deployment/kept", wish("kept", 2), NOW)
    here.collect(LATER, {})
    changed = former.adopt(here.records(), LATER, last_contact)
    assert sorted(record.key for record in changed) == ["deployment/kept", "member/a"]
    assert list(wishes(former)) == ["kept", "own"]


def test_who_was_never_in_a_mesh_brings_in_all_it_has():
    single = ReplicatedMap(B)
    single.put("deployment/own", wish("own"), NOW)
    single.adopt(mesh(A)[0].records(), NOW + DAY, None)
    assert list(wishes(single)) == ["own"]
    assert list(members(single)) == [A]
