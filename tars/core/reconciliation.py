"""How two copies of the replicated map become the same: rumours for what is fresh, comparison by key ranges for what was missed.

Law of this file: pure. A rumour is told 3 log2(n + 1) times by each node that hears it (epidemic broadcast: Demers et al., "Epidemic
Algorithms for Replicated Database Maintenance", 1987; the factor is memberlist's). A comparison takes two exchanges and begins only where
roots differ, so nothing is sent when nothing changed:

    A -> B  Compare(hashes of A's ranges)      B -> A  Want(ranges that differ, B's stamps there),
                                                       and the records of ranges where A has none
    A -> B  records that B lacks, and          B -> A  records that A lacks
            Want(no ranges, the keys where B is ahead)

Every packet stays near `PACKET_BYTES`; what does not fit into `MOST_PACKETS` waits for the next comparison, which then no longer finds
the ranges that are equal by now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from math import ceil, log2
from typing import TypeVar

from tars.core.mesh_messages import Body, Compare, News, Record, Stamp, Want
from tars.core.replicated_map import (
    MEMBER,
    RANGE_BITS,
    RANGES,
    ReplicatedMap,
    is_removal_of_member,
    prefix_of,
    range_of,
)
from tars.core.types import NodeId

PACKET_BYTES = 32_768
"""Of records or stamps in one packet, about. A single record may be larger, and then travels alone."""
MOST_PACKETS = 8
"""In one answer: 256 KiB are well under every body limit, and take 20 ms on a 100 Mbit/s link."""
COMPARE_SECONDS = 2.0
"""Between two comparisons that this node begins: rumours settle most differences before, at no cost."""
BULK = 16
"""So many records that change at once come from a comparison: every node finds them by its own, and they would crowd out fresh rumours."""
MOST_RUMOURS = 512
"""Pending at once; the most told leave first, and comparison finds what they would have said."""
FEW_RECORDS = 512
"""Up to here 16 ranges are compared, above 256: hashes and stamps then cost about the same."""


@dataclass(slots=True)
class _Rumour:
    told: int
    order: int
    size: int | None = None
    """Bytes of the record as JSON, once it was asked for."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One answer to a comparison: an envelope's body and the records that ride with it."""

    body: Body
    records: tuple[Record, ...] = ()


class Reconciliation:
    """One node's side. It never merges: whoever receives records merges them into the map and tells `note` what changed."""

    def __init__(self, records: ReplicatedMap, *, compare_seconds: float = COMPARE_SECONDS):
        self._map = records
        self._compare_seconds = compare_seconds
        self._compare_at = float("-inf")
        self._rumours: dict[str, _Rumour] = {}
        self._noted = 0

    # --- rumours ------------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Rumours that are not told often enough yet."""
        return len(self._rumours)

    def note(self, changed: Sequence[Record]) -> None:
        """These changed the map just now, written here or heard: tell others. A bulk may be only a part: compare again at once."""
        if len(changed) >= BULK:
            self._compare_at = float("-inf")
            return
        for record in changed:
            self._noted += 1
            self._rumours[record.key] = _Rumour(0, -self._noted)
        if len(self._rumours) > MOST_RUMOURS:
            ranked = sorted(self._rumours, key=self._rank)
            for key in ranked[MOST_RUMOURS:]:
                del self._rumours[key]

    def rumours(self, peers: int, limit_bytes: int = 8_192) -> tuple[Record, ...]:
        """What to tell in the next packet to one of `peers` peers: least told first, then the freshest; each told counts.

        About `limit_bytes` as JSON; a record larger than that comes alone, so that it comes at all. Nothing when there are no peers.
        """
        if not self._rumours or peers < 1:
            return ()
        most = 3 * ceil(log2(peers + 1))
        chosen: list[Record] = []
        left = limit_bytes
        for key in sorted(self._rumours, key=self._rank):
            record = self._map.record(key)
            if record is None:  # vanished with its node, or collected
                del self._rumours[key]
                continue
            rumour = self._rumours[key]
            size = rumour.size
            if size is None:
                size = rumour.size = record_size(record)
            if size > left and chosen:
                continue
            chosen.append(record)
            left -= size
            rumour.told += 1
            if rumour.told >= most:
                del self._rumours[key]
            if left <= 0:
                break
        return tuple(chosen)

    def _rank(self, key: str) -> tuple[int, int]:
        rumour = self._rumours[key]
        return (rumour.told, rumour.order)

    # --- comparison ---------------------------------------------------------------------------------------------------

    def compare(self, their_root: int, now: float) -> Compare | None:
        """What to ask a peer whose envelope carried this root; None where the maps are equal, or a comparison was begun just now.

        Only the side that asked for the envelope (got an Ack) should call this: else both would compare the same difference.
        """
        if their_root == self._map.root or now < self._compare_at:
            return None
        self._compare_at = now + self._compare_seconds
        level = RANGE_BITS // 2 if len(self._map) <= FEW_RECORDS else RANGE_BITS
        return Compare(level, tuple(sorted(self._map.hashes(level).items())))

    def handle(self, body: Compare | Want) -> list[Packet]:
        """The answers to a peer's question, each one packet back to it; empty where there is no difference."""
        return self._answer_compare(body) if isinstance(body, Compare) else self._answer_want(body)

    def _answer_compare(self, body: Compare) -> list[Packet]:
        if not 0 <= body.level <= RANGE_BITS:
            return []
        theirs, mine = dict(body.hashes), self._map.hashes(body.level)
        width = RANGES >> body.level
        differing = [number for number in range(1 << body.level) if theirs.get(number, 0) != mine.get(number, 0)]
        # Where the peer has nothing at all, there is nothing to ask.
        empty = {fine for number in differing if number not in theirs for fine in _finest(number, width)}
        asked = [fine for number in differing if number in theirs for fine in _finest(number, width)]
        packets = [Packet(News(), records) for records in _in_packets(self._map.in_ranges(empty))][:MOST_PACKETS]
        return packets + [Packet(want) for want in _wants(asked, self._map.in_ranges(asked))][:MOST_PACKETS]

    def _answer_want(self, body: Want) -> list[Packet]:
        have = dict(body.have)
        mine = {record.key: record for record in self._map.in_ranges(body.ranges)} if body.ranges else {}
        # Without ranges it asks for single keys, those where this node is ahead.
        asked = mine if body.ranges else {key: found for key in have if (found := self._map.record(key)) is not None}
        newer = [record for record in asked.values() if _is_news(record, have.get(record.key))]
        packets = [Packet(News(), records) for records in _in_packets(newer)][:MOST_PACKETS]
        if body.ranges:
            behind = [
                (key, mine[key].stamp if key in mine else NEVER)
                for key, stamp in body.have
                if key not in mine or _may_be_news(mine[key], stamp)
            ]
            packets += [Packet(Want((), stamps)) for stamps in _in_packets(behind)][:MOST_PACKETS]
        return packets


def _finest(number: int, width: int) -> range:
    """The finest ranges in a range that holds `width` of them."""
    return range(number * width, (number + 1) * width)


NEVER = Stamp(0, 0, NodeId(""))
"""In a `Want`: of this key nothing is here."""


def _is_news(record: Record, theirs: Stamp | None) -> bool:
    """Whether a peer whose record has the stamp `theirs` should get this one. A removed member's wins against any later stamp."""
    if theirs is None or record.stamp > theirs:
        return True
    return is_removal_of_member(record.value) and record.stamp != theirs


def _may_be_news(mine: Record, theirs: Stamp) -> bool:
    """Whether a peer's record with the stamp `theirs` may win here: a later one, or a member's that may say that it was removed."""
    return theirs > mine.stamp or (theirs != mine.stamp and prefix_of(mine.key) == MEMBER)


def _wants(ranges: Sequence[int], records: Sequence[Record]) -> Iterator[Want]:
    """Questions for these ranges, each with about `PACKET_BYTES` of stamps; a range is never split."""
    by_range: dict[int, list[tuple[str, Stamp]]] = {number: [] for number in ranges}
    for record in records:
        by_range[range_of(record.key)].append((record.key, record.stamp))
    asked: list[int] = []
    have: list[tuple[str, Stamp]] = []
    size = 0
    for number, stamps in by_range.items():
        more = sum(len(key) + STAMP_BYTES for key, _ in stamps)
        if asked and size + more > PACKET_BYTES:
            yield Want(tuple(asked), tuple(have))
            asked, have, size = [], [], 0
        asked.append(number)
        have += stamps
        size += more
    if asked:
        yield Want(tuple(asked), tuple(have))


_Item = TypeVar("_Item", Record, tuple[str, Stamp])


def _in_packets(items: Sequence[_Item]) -> Iterator[tuple[_Item, ...]]:
    """Portions of about `PACKET_BYTES`, at least one item each."""
    portion: list[_Item] = []
    size = 0
    for item in items:
        more = record_size(item) if isinstance(item, Record) else len(item[0]) + STAMP_BYTES
        if portion and size + more > PACKET_BYTES:
            yield tuple(portion)
            portion, size = [], 0
        portion.append(item)
        size += more
    if portion:
        yield tuple(portion)


# --- sizes --------------------------------------------------------------------------------------------------------------

STAMP_BYTES = 96
"""A stamp as JSON: 13 digits, a counter, a UUID, and the names of the three."""


@dataclass(frozen=True, slots=True)
class _ByStamp:
    """A record that is told apart by key and stamp only: comparing whole adverts would cost more than their size does."""

    key: str
    stamp: Stamp
    record: Record = field(compare=False)


def record_size(record: Record) -> int:
    """Bytes of a record as JSON, about, and rather too many."""
    return _record_size(_ByStamp(record.key, record.stamp, record))


@lru_cache(maxsize=16_384)
def _record_size(record: _ByStamp) -> int:
    return len(record.key) + STAMP_BYTES + 32 + _size(record.record.value)


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value) + 3
    if isinstance(value, tuple):
        return 2 + sum(_size(each) + 1 for each in value)
    if is_dataclass(value):
        # Fields that hold their default are not written.
        return 2 + sum(
            len(each.name) + 4 + _size(held)
            for each in fields(value)
            if (held := getattr(value, each.name)) != each.default
        )
    return len(repr(value)) + 1
