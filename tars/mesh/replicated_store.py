"""This node's copy of the replicated map, kept in its state folder.

Law of this file: what this node itself decides is on the disk before it counts (`DiskFull`: nothing changed). What peers told is taken
first and saved soon: they have it too. `records.json` holds what must not be lost, `adverts.json` what is made anew all the time. A damaged
file is kept aside, never overwritten, and the node starts: its peers send everything back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import orjson

from tars.core.hybrid_clock import HybridClock
from tars.core.mesh_messages import Record, Stamp
from tars.core.records import Value
from tars.core.replicated_map import (
    KINDS,
    SETTLED_SECONDS,
    TOMBSTONE_SECONDS,
    VOLATILE,
    Refused,
    ReplicatedMap,
    members,
    prefix_of,
)
from tars.core.types import NodeId
from tars.errors import InvalidParams, TarsError
from tars.mesh.record_codec import checked, decode_record, decode_stamp, encode_record, encode_stamp
from tars.state_folder import StateFolder, write_atomically

log = logging.getLogger(__name__)

DURABLE_FILE = "records.json"
VOLATILE_FILE = "adverts.json"
SAVE_SECONDS = 5.0
"""Between hearing a decision and saving it: a burst is written once. Its author has it on disk already."""
SAVE_VOLATILE_SECONDS = 60.0
"""Adverts change every few seconds somewhere; after a start they are minutes old at any rate."""

CONTACT_GAP_MS = 60_000
"""Peers are heard every second: a longer silence by the wall clock was a sleep, a cut, or a jump of the clock."""

Changed = Callable[[Sequence[Record]], None]
"""Told of each write of this node, after it counts."""


def wall_ms() -> int:
    """Unix time in ms, by this PC's clock."""
    return time.time_ns() // 1_000_000


class Records(Protocol):
    """What keeps the map for those who write to it."""

    map: ReplicatedMap
    lost: bool
    """True where the durable records were missing or damaged at this start, so that what is not there was not removed."""

    def put(self, key: str, value: Value, *, saved: bool = True) -> Record:
        """Write, saved before it counts. Raises `DiskFull` (nothing changed) or `InvalidParams` (no node would take it).

        `saved` False is for what can be had again (an advert, a measurement, an entry of the configuration file): it counts at once.
        """

    def remove(self, key: str) -> Record:
        """Write a tombstone; raises like `put`."""

    def restore(self, record: Record) -> None:
        """Take a record of this node back that was lost, with its old stamp: every later decision wins against it."""

    def subscribe(self, changed: Changed) -> None:
        """From now on, tell of each write of this node."""


class MemoryStore:
    """The map without a disk: what a test or a simulation needs, and the writing half of `ReplicatedStore`."""

    def __init__(self, records: ReplicatedMap | NodeId, clock: Callable[[], int] = wall_ms):
        self.map = records if isinstance(records, ReplicatedMap) else ReplicatedMap(records)
        self.lost = False
        self._clock = clock
        self._subscribers: list[Changed] = []

    def put(self, key: str, value: Value, *, saved: bool = True) -> Record:
        """See `Records.put`."""
        return self._write(key, value, saved)

    def remove(self, key: str) -> Record:
        """See `Records.remove`."""
        return self._write(key, None, True)

    def restore(self, record: Record) -> None:
        """See `Records.restore`."""
        if self.map.merge([checked(record)], self._clock()):
            self._before(record, False)

    def subscribe(self, changed: Changed) -> None:
        """See `Records.subscribe`."""
        self._subscribers.append(changed)

    def _write(self, key: str, value: Value | None, saved: bool) -> Record:
        now = self._clock()
        try:
            record = checked(self.map.draft(key, value, now))
        except Refused as refusal:
            raise InvalidParams(f"{refusal}. Nothing was changed.") from None
        self._before(record, saved)
        self.map.merge([record], now)
        for told in self._subscribers:
            told([record])
        return record

    def _before(self, record: Record, saved: bool) -> None:
        """What must happen before the record counts."""


class ReplicatedStore(MemoryStore):
    """See the module's law. Not thread-safe: everything but the writing of bytes happens where the event loop runs."""

    def __init__(
        self,
        folder: StateFolder,
        node: NodeId,
        *,
        clock: Callable[[], int] = wall_ms,
        tombstone_seconds: float = TOMBSTONE_SECONDS,
    ):
        self._folder = folder
        self._unknown: list[Any] = []
        self._writing = threading.Lock()
        self._written: dict[str, int] = {}
        self._version = 0
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        durable, volatile = self._read(DURABLE_FILE), self._read(VOLATILE_FILE)
        last = self._last_stamp(durable, volatile)
        super().__init__(ReplicatedMap(node, HybridClock(node, last), tombstone_seconds=tombstone_seconds), clock)
        self.lost = not durable
        self.last_contact_ms: int | None = _moment(durable.get("last_contact_ms"))
        """When this node last heard of a peer; None where it never did."""
        self._contact_since_ms: int | None = None
        # The durable ones first: whether an advert still counts depends on the members.
        for content, name in ((durable, DURABLE_FILE), (volatile, VOLATILE_FILE)):
            self._load(content, name)

    # --- what the mesh's driver says ------------------------------------------------------------------------------------

    def changed(self, keys: Iterable[str]) -> None:
        """Records of these keys were merged into the map: save them soon."""
        for key in keys:
            self._mark(prefix_of(key))

    def contact(self) -> None:
        """A peer was heard just now. Costs nothing; it is on disk with the next save, an hour old at most while the node runs."""
        now = max(self._clock(), 0)
        unbroken = self.last_contact_ms is not None and 0 <= now - self.last_contact_ms <= CONTACT_GAP_MS
        if self._contact_since_ms is None or not unbroken:
            self._contact_since_ms = now
        if self.last_contact_ms is None or now - self.last_contact_ms > 3_600_000:
            self._dirty.add(DURABLE_FILE)
            self._wake.set()
        self.last_contact_ms = now

    def adopt(self, theirs: Sequence[Record]) -> list[Record]:
        """On joining a mesh: take its whole map, see `ReplicatedMap.adopt`. On disk before it returns; raises `DiskFull` (join again)."""
        changed = self.map.adopt(theirs, self._clock(), self.last_contact_ms)
        self.last_contact_ms = max(self._clock(), 0)
        self.save()
        return changed

    def collect(self, alive_since_ms: Mapping[NodeId, int]) -> list[str]:
        """Forget stable tombstones, see `ReplicatedMap.collect`.

        A PC that slept for weeks, or whose clock jumped, would take fresh tombstones for old ones at once: it forgets nothing before it
        has been among its peers for `SETTLED_SECONDS` without a break by its own clock.
        """
        now = self._clock()
        among_peers = any(not each.removed and each.node != self.map.node for each in members(self.map).values())
        settled_ms = now - SETTLED_SECONDS * 1000
        if among_peers and (self._contact_since_ms is None or self._contact_since_ms > settled_ms):
            return []
        gone = self.map.collect(now, alive_since_ms)
        self.changed(gone)
        return gone

    # --- the disk -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Save what changed, a little later, until cancelled: then call `close`. A full disk is said once and tried again."""
        complained = False
        volatile_at = time.monotonic() + SAVE_VOLATILE_SECONDS
        while True:
            until = volatile_at - time.monotonic() if self._dirty == {VOLATILE_FILE} else None
            try:
                async with asyncio.timeout(None if until is None else max(0.0, until)):
                    await self._wake.wait()
                self._wake.clear()
                await asyncio.sleep(SAVE_SECONDS)
            except TimeoutError:
                pass
            names = {name for name in self._dirty if name != VOLATILE_FILE or time.monotonic() >= volatile_at}
            if VOLATILE_FILE in names:
                volatile_at = time.monotonic() + SAVE_VOLATILE_SECONDS
            try:
                for name in sorted(names):
                    self._dirty.discard(name)
                    await asyncio.to_thread(self._write_file, name, *self._content(name))
                complained = complained and not names
            except (TarsError, OSError) as error:
                self._dirty |= names
                self._wake.set()
                if not complained:
                    log.warning("what the mesh's other nodes told was not saved, and will be tried again: %s", error)
                complained = True
            except asyncio.CancelledError:
                # Not written for certain: a thread that began goes on alone. `close` waits for it and writes once more.
                self._dirty |= names
                raise

    def save(self) -> None:
        """Save everything now. Raises `DiskFull` or `OSError`."""
        for name in (DURABLE_FILE, VOLATILE_FILE):
            self._write_file(name, *self._content(name))
            self._dirty.discard(name)

    def close(self) -> None:
        """Save what is not saved yet; a disk that is full now is only said, since peers or the next start have all of it."""
        if not self._dirty:
            return
        try:
            self.save()
        except (TarsError, OSError) as error:
            log.warning("the last news of the mesh was not saved: %s", error)

    def _before(self, record: Record, saved: bool) -> None:
        prefix = prefix_of(record.key)
        if prefix in VOLATILE or not saved:
            self._mark(prefix)
        else:
            self._write_file(DURABLE_FILE, *self._content(DURABLE_FILE, record))

    def _mark(self, prefix: str) -> None:
        self._dirty.add(VOLATILE_FILE if prefix in VOLATILE else DURABLE_FILE)
        self._wake.set()

    def _content(self, name: str, draft: Record | None = None) -> tuple[int, dict[str, Any]]:
        """The file's content as of now, and `draft` in it; with a number that grows, so that an older one never replaces a newer."""
        records = {
            record.key: record
            for record in self.map.records()
            if (prefix_of(record.key) in VOLATILE) == (name == VOLATILE_FILE)
        }
        if draft is not None:
            records[draft.key] = draft
        self._version += 1
        last = self.map.clock.last
        return self._version, {
            "version": 1,
            "clock": None if last is None else encode_stamp(last),
            **({"last_contact_ms": self.last_contact_ms} if name == DURABLE_FILE else {}),
            "records": list(records.values()),
            "unknown": self._unknown if name == DURABLE_FILE else [],
        }

    def _write_file(self, name: str, version: int, content: dict[str, Any]) -> None:
        """May run in a thread: it gets frozen records, and writes them."""
        with self._writing:
            if version <= self._written.get(name, 0):
                return
            plain = [encode_record(record) for record in content["records"]] + content["unknown"]
            fields = {key: value for key, value in content.items() if key != "unknown"}
            write_atomically(self._folder.path / name, orjson.dumps({**fields, "records": plain}))
            self._written[name] = version

    # --- reading at the start -------------------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any]:
        path = self._folder.path / name
        try:
            content = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, orjson.JSONDecodeError) as error:
            self._put_aside(name, str(error))
            return {}
        if not isinstance(content, dict) or not isinstance(content.get("records"), list):
            self._put_aside(name, "it is no list of records")
            return {}
        return content

    def _load(self, content: dict[str, Any], name: str) -> None:
        records: list[Record] = []
        faults: list[str] = []
        for index, plain in enumerate(content.get("records", [])):
            try:
                record = decode_record(plain, f"records[{index}]")
            except InvalidParams as bad:
                faults.append(bad.message)
                continue
            if record is not None:
                records.append(record)
            elif prefix_of(plain["key"]) not in KINDS:
                # Of a newer version that ran here before: kept, so that going back and forth loses nothing.
                self._unknown.append(plain)
        before = self.map.refusals
        self.map.merge(records, self._clock())
        faults += [self.map.last_refusal or ""] * (self.map.refusals - before)
        if faults:
            self.lost = self.lost or name == DURABLE_FILE
            self._put_aside(name, f"{len(faults)} of its records cannot be read; the first: {faults[0]}", copy=True)

    def _put_aside(self, name: str, why: str, *, copy: bool = False) -> None:
        path = self._folder.path / name
        aside = path.with_name(f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        try:
            if copy:
                write_atomically(aside, path.read_bytes())
            else:
                path.replace(aside)
            kept = f"It is kept as {aside.name}"
        except (TarsError, OSError) as error:
            kept = f"It could not be kept aside ({error})"
        log.error(
            "%s in the state folder is damaged (%s). %s. The node starts without what is lost; the mesh's other nodes send it back, a "
            "single node needs its deployments given again",
            name,
            why,
            kept,
        )

    @staticmethod
    def _last_stamp(*contents: dict[str, Any]) -> Stamp | None:
        found = []
        for content in contents:
            try:
                found.append(decode_stamp(content.get("clock")))
            except InvalidParams:
                continue  # the records' own stamps are observed as they are read
        return max(found, default=None)


def _moment(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
