"""What all nodes know, the same on each: key -> value, and of two writes the later one wins.

Law of this file: pure. `merge` is commutative, associative and idempotent, so records may come late, doubled and in any order. A removal
is a record without a value (a tombstone). Two rules beside "the later stamp wins":
- A removed member stays removed, whatever is written later, and its `node/` and `orders/` records vanish; it comes back under a new id.
- Tombstones are collected only when they are stable: older than `TOMBSTONE_SECONDS`, and every member that is not removed has been
  alive here for `SETTLED_SECONDS` without a break, so that it has long heard of them (causal stability: Baquero, Almeida, Shoker, "Making
  Operation-Based CRDTs Operation-Based", 2014). A PC that is away for months holds collection up, and so can resurrect nothing; a few
  hundred bytes a removal is what that costs. Whoever joins anew with an old folder goes through `adopt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b

from tars.core.hybrid_clock import HybridClock
from tars.core.mesh_messages import Record, Stamp
from tars.core.records import ClientKey, MeasuredLoad, Member, NodeAdvert, Orders, Value, Wish
from tars.core.types import Assignment, DeviceSnapshot, NodeId

NODE, MEMBER, DEPLOYMENT, ORDERS, MEASURED, KEY = "node/", "member/", "deployment/", "orders/", "measured/", "key/"
KINDS: Mapping[str, type[Value]] = {
    NODE: NodeAdvert,
    MEMBER: Member,
    DEPLOYMENT: Wish,
    ORDERS: Orders,
    MEASURED: MeasuredLoad,
    KEY: ClientKey,
}
"""The value's type by the key's prefix. A prefix that is not here comes from another version and is not kept."""
VOLATILE = frozenset({NODE, ORDERS})
"""Prefixes whose records are made anew all the time: losing the newest of them in a crash loses nothing."""

MOST_KEY_LENGTH = 512
"""Characters of a key: a model's or a card's name has 255 at most."""
TOMBSTONE_SECONDS = 30 * 86_400
"""A removal is remembered at least so long."""
SETTLED_SECONDS = 3_600
"""Alive so long, a member has compared its map with others hundreds of times."""
RANGE_BITS = 8
"""Keys fall into 2**8 ranges by their hash, each with a hash of its own: the finest level of a comparison."""
RANGES = 2**RANGE_BITS


@lru_cache(maxsize=65_536)
def prefix_of(key: str) -> str:
    """`deployment/` of `deployment/mistral-7b`; empty where there is none."""
    return key[: key.find("/") + 1]


@lru_cache(maxsize=65_536)
def range_of(key: str) -> int:
    """In which of the `RANGES` a key is; the same on every node."""
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]


@lru_cache(maxsize=65_536)
def _hash_of(key: str, stamp: Stamp) -> int:
    text = f"{key}\0{stamp.wall_ms}\0{stamp.counter}\0{stamp.node}"
    # 60 bits, so that it stays in the bounds of every other number of a record.
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 4


class Refused(ValueError):
    """A write that no node would take; the message says why."""


class ReplicatedMap:
    """One node's copy. `clock` is given where its last stamp was kept over a restart."""

    def __init__(self, node: NodeId, clock: HybridClock | None = None, *, tombstone_seconds: float = TOMBSTONE_SECONDS):
        self.node = node
        self.clock = HybridClock(node) if clock is None else clock
        self.refusals = 0
        """Records from outside that were not taken since the start, each for a reason that `last_refusal` gives."""
        self.last_refusal: str | None = None
        self._tombstone_ms = int(tombstone_seconds * 1000)
        self._records: dict[str, dict[str, Record]] = {prefix: {} for prefix in KINDS}
        self._hashes = [0] * RANGES
        self._root = 0
        self._collected_before_ms = 0

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def root(self) -> int:
        """60 bits over every key and stamp; equal roots are equal maps. Costs nothing: every change brings it up to date."""
        return self._root

    def __len__(self) -> int:
        """Records, tombstones too."""
        return sum(map(len, self._records.values()))

    def record(self, key: str) -> Record | None:
        """The record of a key, a tombstone too."""
        return self._records.get(prefix_of(key), {}).get(key)

    def get(self, key: str) -> Value | None:
        """The value of a key; None where there is none, or was removed."""
        record = self.record(key)
        return None if record is None else record.value

    def items(self, prefix: str) -> list[tuple[str, Value]]:
        """Live (key, value) pairs whose key begins with `prefix`, sorted by key."""
        found = self._records.get(prefix_of(prefix), {})
        return [
            (key, found[key].value)  # type: ignore[misc]  # the condition says that it is not None
            for key in sorted(found)
            if key.startswith(prefix) and found[key].value is not None
        ]

    def records(self) -> Iterator[Record]:
        """Every record, tombstones too. The map must not change meanwhile: take a list where it may."""
        for kind in self._records.values():
            yield from kind.values()

    def hashes(self, level: int = RANGE_BITS) -> dict[int, int]:
        """Of the 2**level ranges, those that are not empty: range -> hash. A range holds 2**(RANGE_BITS - level) of the finest."""
        found: dict[int, int] = {}
        for fine, value in enumerate(self._hashes):
            coarse = fine >> (RANGE_BITS - level)
            found[coarse] = found.get(coarse, 0) ^ value
        return {number: value for number, value in found.items() if value}

    def in_ranges(self, ranges: Iterable[int]) -> list[Record]:
        """The records of these finest ranges, sorted by key."""
        asked = frozenset(ranges)
        return sorted(
            (record for record in self.records() if range_of(record.key) in asked), key=lambda record: record.key
        )

    # --- writing -----------------------------------------------------------------------------------------------------

    def draft(self, key: str, value: Value | None, wall_ms: int) -> Record:
        """The record that a write would make, stamped, for whoever must save it before it counts (`merge` it then). Raises `Refused`."""
        record = Record(key, self.clock.tick(wall_ms), value)
        if (wrong := self._why_not(record)) is not None:
            raise Refused(wrong)
        current = self.record(key)
        if current is not None and not _beats(record, current):
            raise Refused(f"{key} was removed from the mesh for good")
        return record

    def put(self, key: str, value: Value, wall_ms: int) -> Record:
        """Write; later than every write seen so far. Raises `Refused` for what no node would take."""
        return self._take(self.draft(key, value, wall_ms))

    def remove(self, key: str, wall_ms: int) -> Record:
        """Remove, by a tombstone. Raises `Refused` for what may not be removed (members: put them with `removed`)."""
        return self._take(self.draft(key, None, wall_ms))

    def merge(self, records: Iterable[Record], wall_ms: int) -> list[Record]:
        """Take what is later than what is here; gives back what changed the map. What is not valid is left out and counted."""
        changed = []
        for record in records:
            wrong = self._why_malformed(record) or self.clock.why_damaged(record.stamp, wall_ms)
            if wrong is not None:
                self.refusals += 1
                self.last_refusal = wrong
                continue
            self.clock.observe(record.stamp)
            if self._is_newer(record):
                changed.append(self._take(record))
        return changed

    def adopt(self, theirs: Iterable[Record], wall_ms: int, last_contact_ms: int | None) -> list[Record]:
        """Merge a whole map on joining a mesh; gives back what changed.

        A node that was in a mesh before (`last_contact_ms`: when it last heard of a peer, by its own clock) forgets what is older than
        that and not in `theirs`: it was removed meanwhile, and the tombstone may have been collected. What it wrote since, it brings in.
        None: it was never in a mesh, and brings in all it has.
        """
        theirs = list(theirs)
        if last_contact_ms is not None:
            known = {record.key for record in theirs}
            for record in list(self.records()):
                if record.key not in known and record.stamp.wall_ms <= last_contact_ms:
                    self._drop(record.key)
        return self.merge(theirs, wall_ms)

    def collect(self, wall_ms: int, alive_since_ms: Mapping[NodeId, int]) -> list[str]:
        """Forget the stable tombstones (see the module's law); gives back their keys.

        `alive_since_ms`: since when this node has seen each peer alive without a break, up to now, by this node's wall clock; peers that
        are not alive now are left out.
        """
        settled_ms = wall_ms - SETTLED_SECONDS * 1000
        for member in members(self).values():
            if member.removed or member.node == self.node:
                continue
            if alive_since_ms.get(member.node, wall_ms) > settled_ms:
                return []
        before_ms = min(wall_ms - self._tombstone_ms, settled_ms)
        stable = [record.key for record in self.records() if record.value is None and record.stamp.wall_ms < before_ms]
        for key in stable:
            self._drop(key)
        self._collected_before_ms = max(self._collected_before_ms, before_ms)
        return stable

    # --- inside ------------------------------------------------------------------------------------------------------

    def _is_newer(self, record: Record) -> bool:
        current = self.record(record.key)
        if current is not None:
            return _beats(record, current)
        if record.value is None and record.stamp.wall_ms < self._collected_before_ms:
            return False  # a peer that has not collected it yet
        return not self._has_vanished(record.key)

    def _has_vanished(self, key: str) -> bool:
        """Whether this is a `node/` or `orders/` record of a removed member."""
        prefix = prefix_of(key)
        if prefix not in VOLATILE:
            return False
        member = self.get(MEMBER + key[len(prefix) :])
        return isinstance(member, Member) and member.removed

    def _take(self, record: Record) -> Record:
        self._drop(record.key)
        self._records[prefix_of(record.key)][record.key] = record
        self._toggle(record)
        if isinstance(record.value, Member) and record.value.removed:
            self._drop(NODE + record.value.node)
            self._drop(ORDERS + record.value.node)
        return record

    def _drop(self, key: str) -> None:
        if (old := self._records[prefix_of(key)].pop(key, None)) is not None:
            self._toggle(old)

    def _toggle(self, record: Record) -> None:
        value = _hash_of(record.key, record.stamp)
        self._root ^= value
        self._hashes[range_of(record.key)] ^= value

    def _why_not(self, record: Record) -> str | None:
        if self._has_vanished(record.key):
            return f"{record.key}: the node was removed from the mesh"
        return self._why_malformed(record)

    @staticmethod
    def _why_malformed(record: Record) -> str | None:
        """Why no node would take this record, as a sentence; None where they would."""
        key, value, prefix = record.key, record.value, prefix_of(record.key)
        if prefix not in KINDS:
            return f"{key[:64]!r} is no key of the replicated map that this version knows"
        if not len(prefix) < len(key) <= MOST_KEY_LENGTH:
            return f"a key of {len(key)} characters ({key[:64]!r}...); it may have {MOST_KEY_LENGTH}, and needs a name"
        name = key[len(prefix) :]
        if prefix == NODE and record.stamp.node != name:
            return f"{key} was written by node {record.stamp.node}, and only a node itself says how it is"
        if value is None:
            return f"{key}: a member is never forgotten, only marked as removed" if prefix == MEMBER else None
        if not isinstance(value, KINDS[prefix]):
            return f"{key} holds a {type(value).__name__}, and should hold a {KINDS[prefix].__name__}"
        if (own := _name_of(value)) is not None and own != name:
            return f"{key} holds the record of {own!r}"
        if isinstance(value, NodeAdvert) and any(part.node != name for part in _parts(value)):
            return f"{key} tells of devices or replicas of another node"
        if isinstance(value, Orders) and value.coordinator != record.stamp.node:
            return f"{key} was written by node {record.stamp.node} in the name of {value.coordinator}"
        return None


def _parts(advert: NodeAdvert) -> Iterator[DeviceSnapshot | Assignment]:
    yield from advert.node.devices
    for report in advert.replicas:
        yield report.assignment


def _name_of(value: Value) -> str | None:
    """What must stand in the key after its prefix; None where that is free."""
    match value:
        case NodeAdvert():
            return value.node.id
        case Member() | Orders():
            return value.node
        case Wish():
            return value.deployment.model
        case ClientKey():
            return value.name
        case MeasuredLoad():
            return measured_key(value)[len(MEASURED) :]


def _beats(record: Record, other: Record) -> bool:
    """Whether `record` wins against `other`, of the same key."""
    removed, other_removed = is_removal_of_member(record.value), is_removal_of_member(other.value)
    if removed != other_removed:
        return removed
    if record.stamp != other.stamp:
        return record.stamp > other.stamp
    if record.value == other.value:  # heard again, as every rumour is; cheaper than the texts below
        return False
    # Two writes with one stamp, which no sound node makes: any rule will do that is the same everywhere.
    return (record.value is None, repr(record.value)) > (other.value is None, repr(other.value))


def is_removal_of_member(value: Value | None) -> bool:
    """Whether this is the last word on a member: it wins against every other record of it, later ones too."""
    return isinstance(value, Member) and value.removed


# --- the kinds, typed ---------------------------------------------------------------------------------------------------


def measured_key(load: MeasuredLoad) -> str:
    """The key of a measured load: `measured/<card>|<file>|<context>|<slots>|<kv tokens>|<kv type>|<gpu layers>`."""
    name = "|".join(
        str(part)
        for part in (
            load.card,
            load.file,
            load.context,
            load.slots,
            load.kv_tokens,
            load.kv_type.value,
            load.gpu_layers,
        )
    )
    if len(MEASURED) + len(name) > MOST_KEY_LENGTH:
        name = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return MEASURED + name


def adverts(records: ReplicatedMap) -> dict[NodeId, NodeAdvert]:
    """What each node says of itself, dead ones too; by id, sorted."""
    return {value.node.id: value for _, value in records.items(NODE) if isinstance(value, NodeAdvert)}


def members(records: ReplicatedMap) -> dict[NodeId, Member]:
    """Every node that was ever admitted, removed ones too; by id, sorted."""
    return {value.node: value for _, value in records.items(MEMBER) if isinstance(value, Member)}


def wishes(records: ReplicatedMap) -> dict[str, Wish]:
    """What is wanted; by model, sorted."""
    return {value.deployment.model: value for _, value in records.items(DEPLOYMENT) if isinstance(value, Wish)}


def orders_for(records: ReplicatedMap, node: NodeId) -> Orders | None:
    """What a coordinator last told this node to hold."""
    found = records.get(ORDERS + node)
    return found if isinstance(found, Orders) else None


def overrules(records: ReplicatedMap, keys: Iterable[str], coordinator: NodeId) -> bool:
    """Whether orders of another coordinator than this one are among the records under `keys`."""
    ordered = (orders_for(records, NodeId(key.removeprefix(ORDERS))) for key in keys if key.startswith(ORDERS))
    return any(orders is not None and orders.coordinator != coordinator for orders in ordered)


def measured(records: ReplicatedMap) -> list[MeasuredLoad]:
    """What loads really took, sorted by key."""
    return [value for _, value in records.items(MEASURED) if isinstance(value, MeasuredLoad)]


def keys(records: ReplicatedMap) -> dict[str, ClientKey]:
    """The clients' API keys; by name, sorted."""
    return {value.name: value for _, value in records.items(KEY) if isinstance(value, ClientKey)}
