"""The mesh machine on a real loop: it wakes when something is due, carries envelopes, and tells whoever listens what has changed.

Law of this file: it decides nothing about peers; `core.mesh_machine` does. One peer that does not answer costs the others nothing: every
exchange is a task of its own with a bound on its time, and each peer has a bound on its exchanges.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tars.core.addresses import PeerAddresses, Viewer
from tars.core.mesh_events import (
    Changed,
    CoordinatorChanged,
    Drain,
    Event,
    Leave,
    Loaded,
    LoadHeard,
    MemberChanged,
    MeshView,
    NotSent,
    Readdressed,
    Received,
    RecordsChanged,
    Seed,
    Send,
    Tick,
    Traffic,
)
from tars.core.mesh_machine import MeshMachine
from tars.core.mesh_messages import Envelope, Record
from tars.core.records import Value
from tars.core.types import NodeId
from tars.errors import NotAMember, TarsError
from tars.mesh.replicated_store import Records, wall_ms

log = logging.getLogger(__name__)

Notice = MemberChanged | RecordsChanged | CoordinatorChanged | LoadHeard
Listener = Callable[[Notice], None]
Load = Callable[[], tuple[tuple[str, int, int], ...]]

COLLECT_SECONDS = 3600.0
"""Between two collections of tombstones; they are kept for weeks."""


class Transport(Protocol):
    """How envelopes travel."""

    async def exchange(
        self, address: str, expected: NodeId | None, envelope: Envelope
    ) -> tuple[NodeId, list[Envelope]]:
        """Give `envelope` to whoever is at `address` and bring the answers: who answered, proved by its certificate, and what it said.

        Raises `TarsError` or `OSError` where nobody, or not the `expected` node, is there, and may be cancelled at any time.
        """


class Store(Records, Protocol):
    """What keeps the map: `replicated_store.ReplicatedStore`."""

    def changed(self, keys: Iterable[str]) -> None:
        """Peers told of new records under these keys."""

    def contact(self) -> None:
        """A peer was heard."""

    def collect(self, alive_since_ms: Mapping[NodeId, int]) -> list[str]:
        """Forget stable tombstones."""


@dataclass(frozen=True, slots=True)
class GossipSettings:
    """Bounds on what is under way. Seconds."""

    exchange: float = 2.0
    """One envelope, on all addresses: a new TLS connection through a tailnet's relay takes up to one second."""
    next_address: float = 0.25
    """An address that has not answered so long gets company by the next one (as RFC 8305 does for IPv6 and IPv4)."""
    exchanges: int = 128
    """Under way at once."""
    exchanges_each: int = 4
    """Of those, with one peer: a probe, a helper's probe, a round of news and an answer."""
    answers: int = 64
    """Envelopes in the answer to one."""
    farewell: float = 2.0
    """How long `leave` waits until everybody has been told."""


class Gossip:
    """Drives one machine. Everything but `run` and `leave` returns at once; all of it belongs to the loop's thread.

    `store` is where the machine's map is kept. `viewer` gives the networks that this PC is on; `load` its queues, for its answers.
    """

    def __init__(
        self,
        machine: MeshMachine,
        transport: Transport,
        store: Store,
        *,
        settings: GossipSettings | None = None,
        viewer: Callable[[], Viewer] = Viewer,
        load: Load | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], int] = wall_ms,
    ):
        if store.map is not machine.records:
            raise ValueError("the machine and the store must share one map")
        self.node = machine.node
        self._machine = machine
        self._transport = transport
        self._store = store
        self._settings = settings or GossipSettings()
        self._viewer = viewer
        self._load = load
        self._clock = clock
        self._wall_clock = wall_clock
        self._wake = asyncio.Event()
        self._wakes_at = float("-inf")
        self._listeners: list[Listener] = []
        self._peers: dict[NodeId, PeerAddresses] = {}
        self._under_way: dict[asyncio.Task[None], NodeId | None] = {}
        self._with: Counter[NodeId | None] = Counter()
        self._own_write = False
        self._refusals = machine.records.refusals
        store.subscribe(self._written)

    # --- what others use ----------------------------------------------------------------------------------------------

    def view(self) -> MeshView:
        """How this node sees the mesh."""
        return self._machine.view()

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of every change, on the loop, after it counts. It must not block."""
        self._listeners.append(listener)

    def put(self, key: str, value: Value, *, saved: bool = True) -> Record:
        """Write into the map: saved before it counts, told to the others at once. Raises as `Records.put`."""
        return self._store.put(key, value, saved=saved)

    def remove(self, key: str) -> Record:
        """Remove from the map, likewise."""
        return self._store.remove(key)

    def adopted(self, records: Sequence[Record]) -> None:
        """These came into the map with a join."""
        self._event(Changed(tuple(records)))

    def handle(self, sender: NodeId, envelope: Envelope) -> list[Envelope]:
        """What to answer to `envelope`; `sender` is who its certificate says. Raises `NotAMember` where the envelope says otherwise."""
        if envelope.sender != sender:
            raise NotAMember("This packet was sent in another node's name, so it was not taken.")
        self._heard()
        if self._load is not None:
            self._event(Loaded(self._load()))
        answers: list[Envelope] = []
        self._event(Received(envelope), answers, sender)
        return answers

    def traffic(self, node: NodeId) -> None:
        """A peer answered a call, or made one: it lives."""
        self._event(Traffic(node))

    def seed(self, address: str) -> None:
        """Somebody may be at `address`."""
        self._event(Seed(address))

    def drain(self, on: bool) -> None:
        """Say that this node takes no new work (True), or takes it again."""
        self._event(Drain(on))

    def readdress(self, addresses: Sequence[str]) -> None:
        """This node is reachable there from now on, best first."""
        self._event(Readdressed(tuple(addresses)))

    def network_changed(self) -> None:
        """This PC is on other networks than before: addresses that failed may work now."""
        for peer in self._peers.values():
            peer.forgive()

    def addresses(self, node: NodeId) -> tuple[str, ...]:
        """Where a peer may be, best first."""
        member = self._machine.view().members.get(node)
        if member is None:
            return ()
        now = self._clock()
        return self._ranked(node, member.addresses, now)

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take part until cancelled; then nothing is under way any more. Call `leave` before, to go politely."""
        collect_at = self._clock() + COLLECT_SECONDS
        try:
            while True:
                self._event(Tick())
                now = self._clock()
                if now >= collect_at:
                    collect_at = now + COLLECT_SECONDS
                    self._store.collect(self._machine.alive_since_ms(now, self._wall_clock()))
                self._wake.clear()
                self._wakes_at = min(self._machine.next_due(now), collect_at)
                try:
                    async with asyncio.timeout(max(0.0, self._wakes_at - now)):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._wakes_at = float("-inf")
            await self._stop()

    async def leave(self) -> None:
        """Tell everybody that this node goes, as far as `farewell` seconds allow."""
        before = set(self._under_way)
        self._event(Leave())
        farewells = set(self._under_way) - before
        if farewells:
            await asyncio.wait(farewells, timeout=self._settings.farewell)

    async def _stop(self) -> None:
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- events in, effects out ---------------------------------------------------------------------------------------

    def _event(self, event: Event, answers: list[Envelope] | None = None, asker: NodeId | None = None) -> None:
        """Let the machine handle `event` and do what it says. What it says to `asker` goes into `answers`, as far as they have room."""
        now = self._clock()
        notices: list[Notice] = []
        for effect in self._machine.handle(event, now, self._wall_clock()):
            if not isinstance(effect, Send):
                notices.append(effect)
            elif answers is not None and effect.to == asker and len(answers) < self._settings.answers:
                answers.append(effect.envelope)
            else:
                self._send(effect)
        self._notice(notices)
        if self._machine.next_due(now) < self._wakes_at:
            self._wake.set()

    def _notice(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            if isinstance(notice, RecordsChanged) and not self._own_write:
                self._store.changed(notice.keys)
            if isinstance(notice, MemberChanged) and notice.after is None:
                self._peers.pop(notice.node, None)
            for listener in self._listeners:
                try:
                    listener(notice)
                except Exception:
                    log.exception("a listener failed on %s; the mesh goes on", type(notice).__name__)

    def _written(self, records: Sequence[Record]) -> None:
        """This node wrote, through whoever: it is on disk, and now told."""
        before, self._own_write = self._own_write, True
        try:
            self._event(Changed(tuple(records)))
        finally:
            self._own_write = before

    def _heard(self) -> None:
        self._store.contact()
        records = self._machine.records
        if records.refusals != self._refusals:
            self._refusals = records.refusals
            log.warning("a record that a peer told was not taken: %s", records.last_refusal)

    # --- carrying -----------------------------------------------------------------------------------------------------

    def _send(self, send: Send) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return  # written before the loop runs: told later, as differences always are
        settings = self._settings
        if len(self._under_way) >= settings.exchanges or self._with[send.to] >= self._room(send.to):
            return  # like a lost packet: the machine's timers see to it
        task = asyncio.create_task(self._carry(send), name=f"gossip to {send.to or send.addresses}")
        self._under_way[task] = send.to
        self._with[send.to] += 1
        task.add_done_callback(self._carried)

    def _room(self, to: NodeId | None) -> int:
        """Seeds share one place among the peers, and are many."""
        return self._settings.exchanges_each * (4 if to is None else 1)

    def _carried(self, task: asyncio.Task[None]) -> None:
        to = self._under_way.pop(task)
        self._with[to] -= 1
        if self._with[to] <= 0:
            del self._with[to]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an envelope to %s was not carried, by a fault of TARS", to, exc_info=error)

    async def _carry(self, send: Send) -> None:
        """One envelope to one peer, and its answers back into the machine."""
        number = getattr(send.envelope.body, "number", None)
        addresses = send.addresses if send.to is None else self._ranked(send.to, send.addresses, self._clock())
        try:
            async with asyncio.timeout(self._settings.exchange):
                address, sender, answers = await self._first_answer(addresses, send)
        except (TarsError, OSError, TimeoutError) as error:
            log.debug("no exchange with %s: %s", send.to or send.addresses, error)
            if isinstance(error, TimeoutError):
                self._failed(send.to, addresses)
            self._event(NotSent(send.to, number))
            return
        self._addresses_of(sender).succeeded(address, self._clock())
        for envelope in answers:
            if envelope.sender == sender:
                self._heard()
                self._event(Received(envelope))

    async def _first_answer(self, addresses: Sequence[str], send: Send) -> tuple[str, NodeId, list[Envelope]]:
        """The first address that answers: each has a head start before the next. An envelope may so arrive twice, which is harmless."""
        if not addresses:
            raise OSError("no address is known")
        tries: dict[asyncio.Task[tuple[NodeId, list[Envelope]]], str] = {}
        waiting = list(addresses)
        failure: BaseException | None = None
        try:
            while waiting or tries:
                if waiting:
                    address = waiting.pop(0)
                    attempt = asyncio.create_task(self._transport.exchange(address, send.to, send.envelope))
                    tries[attempt] = address
                done, _ = await asyncio.wait(
                    tries,
                    timeout=self._settings.next_address if waiting else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for attempt in done:
                    address = tries.pop(attempt)
                    failure = OSError("the attempt was cancelled") if attempt.cancelled() else attempt.exception()
                    if failure is None:
                        self._failed(send.to, tries.values())
                        return (address, *attempt.result())
                    if not isinstance(failure, TarsError | OSError | TimeoutError):
                        raise failure
                    self._failed(send.to, (address,))
            raise failure if failure is not None else OSError("no address answered")
        finally:
            for attempt in tries:
                attempt.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    # --- addresses ----------------------------------------------------------------------------------------------------

    def _addresses_of(self, node: NodeId) -> PeerAddresses:
        return self._peers.setdefault(node, PeerAddresses())

    def _failed(self, node: NodeId | None, addresses: Iterable[str]) -> None:
        if node is not None:
            for address in addresses:
                self._addresses_of(node).failed(address, self._clock())

    def _ranked(self, node: NodeId, addresses: Sequence[str], now: float) -> tuple[str, ...]:
        known = self._addresses_of(node)
        known.advertised(addresses, now)
        return known.ranked(self._viewer(), now) or tuple(addresses)
