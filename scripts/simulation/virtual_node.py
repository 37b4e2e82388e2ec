"""One simulated node: the real machines of `tars.core`, driven as `tars.mesh` drives them, on virtual time, with a disk that can be lost.

Law of this file: it decides nothing that the core decides. What the drivers of `tars.mesh` add (saving before it counts, rounds, obeying
only one's own coordinator) it does in the same order, or by their own code; everything that could go wrong is done to it from outside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from breach import Breach
from virtual_engine import VirtualEngine
from virtual_executor import Running, VirtualExecutor
from virtual_fleet import Pc
from virtual_gateway import VirtualGateway
from virtual_network import Answer

from tars.catalogue import Catalogue
from tars.core.coordination import Coordination
from tars.core.coordination_view import CoordinationView, Decision
from tars.core.hybrid_clock import HybridClock
from tars.core.mesh_events import (
    Changed,
    CoordinatorChanged,
    Drain,
    Effect,
    Event,
    Leave,
    MemberChanged,
    NotSent,
    Received,
    RecordsChanged,
    Seed,
    Send,
    Tick,
)
from tars.core.mesh_machine import MeshMachine
from tars.core.mesh_messages import Envelope, MemberState, Record
from tars.core.records import Member, NodeAdvert, Orders, Value
from tars.core.replicated_map import (
    DEPLOYMENT,
    MEASURED,
    MEMBER,
    NODE,
    ORDERS,
    VOLATILE,
    ReplicatedMap,
    adverts,
    members,
    orders_for,
    overrules,
    prefix_of,
    wishes,
)
from tars.core.taking_over import TakingOver
from tars.core.types import Assignment, DeviceSnapshot, NodeId, NodeSnapshot
from tars.mesh.advertising import Advertising
from tars.mesh.coordinator import DEBOUNCE_SECONDS, OVERRULED_SECONDS, ROUND_SECONDS
from tars.mesh.measured_memory import MeasuredMemory

if TYPE_CHECKING:
    from world import World

SAVE_SECONDS = 2.0
"""What was heard is on the disk so much later (`mesh.replicated_store`: 5 s)."""
SAVE_VOLATILE_SECONDS = 12.0
"""What nodes say of themselves, and orders, are on the disk so much later (there: 60 s)."""


NO_CATALOGUE = cast(Catalogue, None)
"""Simulated nodes build their adverts themselves; only the telling of them is the real one."""


class Power(StrEnum):
    """What the process is doing."""

    UP = "up"
    PAUSED = "paused"
    DOWN = "down"
    GONE = "gone"
    """For good: broken, stolen, or removed and switched off."""


@dataclass(slots=True)
class Disk:
    """What survives a crash."""

    records: dict[str, Record] = field(default_factory=dict)
    draining: bool = False


class VirtualNode:
    """A PC of the fleet and the node on it. `node` is another one after a restart that lost the state folder."""

    def __init__(self, pc: Pc, world: World):
        self.pc = pc
        self.world = world
        self.time = world.time
        self.disk = Disk()
        self.power = Power.DOWN
        self.skew = 0.0
        """Seconds that the wall clock is ahead."""
        self.boots = 0
        self.removed = False
        """An operator removed it from the mesh."""
        self.lost = False
        """As `Records.lost`: a simulated disk is never damaged, only lost."""
        self.left = False
        """It said good-bye, and is down."""
        self.ever_left = False
        self.returns = True
        """Whether it comes back when it is down."""
        self.backlog: list[Callable[[], None]] = []
        """What waits until a paused process goes on."""
        self.orders_written = 0
        self.decisions = 0

    @property
    def id(self) -> NodeId:
        return self.pc.node

    @property
    def name(self) -> str:
        return self.pc.name

    @property
    def up(self) -> bool:
        return self.power is Power.UP

    @property
    def runs(self) -> bool:
        return self.power in (Power.UP, Power.PAUSED)

    @property
    def lasting(self) -> bool:
        """Whether what is on its disk can still reach the mesh."""
        return self.power is not Power.GONE and self.returns and not self.removed

    @property
    def draining(self) -> bool:
        return self.disk.draining

    def wall_ms(self) -> int:
        return self.world.wall_ms + int((self.time.now + self.skew) * 1000)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Boot with what is on the disk."""
        self.boots += 1
        self.power, self.left = Power.UP, False
        self.map = ReplicatedMap(self.id, HybridClock(self.id))
        self.map.merge(list(self.disk.records.values()), self.wall_ms())
        dice = random.Random(f"{self.world.seed}/{self.name}/{self.boots}")
        self.machine = MeshMachine(self.id, self.map, self.world.mesh_settings(self.pc), dice)
        self.coordination = Coordination(self.world.coordination_settings)
        self.executor = VirtualExecutor(
            self.pc.devices, self.time, self.world.conditions, changed=self._executor_changed, loaded=self._loaded
        )
        for device, wanted in self.world.foreign.get(self.name, {}).items():
            if device in self.executor.cards:
                self.executor.foreign(device, wanted)
        self.engine_dice = random.Random(f"{self.world.seed}/{self.name}/{self.boots}/engine")
        self.engine = VirtualEngine(self)
        self.gateway = VirtualGateway(self)
        self.coordinator: NodeId | None = None
        self.decision: Decision | None = None
        self.measured = MeasuredMemory(self)
        self.advertising = Advertising(NO_CATALOGUE, self, now=lambda: self.time.now)
        self._tick_at = float("inf")
        self._unsaved: tuple[dict[str, None], dict[str, None]] = ({}, {})
        """Durable keys, volatile keys."""
        self._round_due = False
        self._round_at = float("inf")
        self._taking_over = TakingOver()
        self.world.network.listen(self.pc.address, self._serve)
        self.world.log(self.name, "starts as %s with %d records", self.id, len(self.map))
        if self.draining:
            self.tell(Drain(True))
        self._due(self.advertising.tell(self.advert()))  # as `Coordinator.announce`
        self.tell(Tick())
        self._round()

    def found(self) -> None:
        """Make a mesh of which this is the first member, and start."""
        member = Member(self.id, self.name, f"{self.id}-key", (self.pc.address,))
        record = ReplicatedMap(self.id).put(MEMBER + self.id, member, self.wall_ms())
        self.disk.records[record.key] = record
        self.start()

    def join(self, host: VirtualNode) -> None:
        """Be admitted by a running member, and start with its records."""
        member = Member(self.id, self.name, f"{self.id}-key", (self.pc.address,), host.id)
        host.write(MEMBER + self.id, member)
        fresh = ReplicatedMap(self.id, HybridClock(self.id))
        fresh.adopt(list(host.map.records()), self.wall_ms(), None)
        self.disk.records = {record.key: record for record in fresh.records()}
        self.world.log(self.name, "joins through %s", host.name)
        self.start()

    def crash(self) -> None:
        """The process ends between two instructions, and its workers with it."""
        self.power = Power.DOWN
        self.backlog.clear()
        self.boots += 1
        self.executor.stop_all()
        self.world.network.listen(self.pc.address, None)
        # A moment later it is known whether the whole PC is gone: then nobody closes its connections.
        self.time.after(0.0, lambda: self.world.wire.ended(self.pc.address, power=self.power is not Power.GONE))
        self.world.callers.gateway_died(self)

    def leave(self) -> None:
        """Say good-bye and end."""
        self.tell(Leave())
        for unsaved in self._unsaved:
            self._save(unsaved)
        self.left = self.ever_left = True
        self.crash()

    def pause(self) -> None:
        self.power = Power.PAUSED

    def resume(self) -> None:
        """Go on, with what came meanwhile."""
        self.power = Power.UP
        waiting, self.backlog = self.backlog, []
        for action in waiting:
            action()
        self.tell(Tick())

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do `action` in this process in so many seconds, or when it goes on; never after it ended."""
        self.time.after(seconds, self._in_process(action))

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Likewise, at that very moment."""
        self.time.at(when, self._in_process(action))

    def hears(self, action: Callable[..., None]) -> Callable[..., None]:
        """`action` for what comes to this process from outside: while it is paused that waits, and after its end it is lost."""
        boot = self.boots

        def heard(*args: object) -> None:
            if self.boots == boot:
                if self.power is Power.PAUSED:
                    self.backlog.append(lambda: heard(*args))
                elif self.power is Power.UP:
                    action(*args)

        return heard

    def _in_process(self, action: Callable[[], None]) -> Callable[[], None]:
        boot = self.boots

        def due() -> None:
            if self.boots == boot:
                if self.power is Power.PAUSED:
                    self.backlog.append(due)
                elif self.power is Power.UP:
                    action()

        return due

    # --- the mesh machine ---------------------------------------------------------------------------------------------

    def tell(self, event: Event, asker: NodeId | None = None) -> list[Envelope]:
        """Give the machine an event and do what it wants; gives back the envelopes for `asker`."""
        answers: list[Envelope] = []
        changed: list[str] = []
        for effect in self.machine.handle(event, self.time.now, self.wall_ms()):
            if isinstance(effect, Send):
                if asker is not None and effect.to == asker:
                    answers.append(effect.envelope)
                else:
                    self._send(effect)
            else:
                self._note(effect, changed)
        if changed:
            self._records_changed(changed)
        due = self.machine.next_due(self.time.now)
        if due < self._tick_at:
            self._tick_at = due
            self.time.at(due, self._in_process(lambda: self._tick(due)))
        return answers

    def _tick(self, due: float) -> None:
        if due == self._tick_at:
            self._tick_at = float("inf")
            self.tell(Tick())

    def _send(self, effect: Send) -> None:
        if self.world.tracing:
            self.world.log_packet(self.name, effect.to, effect.envelope)
        if not effect.addresses:
            self.later(0.0, lambda: self._not_sent(effect))
            return
        self.world.sent(effect.envelope)
        address = effect.addresses[0]
        boot = self.boots

        def done(answers: Sequence[Envelope] | None) -> None:
            if self.boots != boot or not self.runs:
                return
            if self.power is Power.PAUSED:
                self.backlog.append(lambda: done(answers))
            elif answers is None:
                self._not_sent(effect)
            else:
                for answer in answers:
                    if effect.to in (None, answer.sender) and self.admits(answer.sender):
                        self.world.received(self, answer)
                        self.tell(Received(answer))

        self.world.network.exchange(self.pc.address, address, effect.envelope, done)

    def _not_sent(self, effect: Send) -> None:
        self.tell(NotSent(effect.to, getattr(effect.envelope.body, "number", None)))

    def _serve(self, envelope: Envelope, answer: Answer) -> None:
        if self.power is Power.PAUSED:
            self.backlog.append(lambda: self._serve(envelope, answer))
        elif not self.admits(envelope.sender):
            answer(None)
        else:
            self.world.received(self, envelope)
            answers = self.tell(Received(envelope), envelope.sender)
            if self.world.tracing:
                for each in answers:
                    self.world.log_packet(self.name, envelope.sender, each)
            for each in answers:
                self.world.sent(each)
            answer(answers)

    def admits(self, node: NodeId) -> bool:
        """What the certificate and the map say: a member, not removed."""
        member = self.map.get(MEMBER + node)
        return isinstance(member, Member) and not member.removed

    def _note(self, effect: Effect, changed: list[str]) -> None:
        match effect:
            case MemberChanged(node, before, after):
                self.world.member_changed(self, node, before, after)
                self.later(0.0, lambda: self.gateway.member_changed(node, after))
                self.wake()
            case CoordinatorChanged(node):
                self.world.log(self.name, "takes %s for the coordinator", self.world.name_of(node))
                self.coordinator = node
                self.wake()
            case RecordsChanged(keys):
                changed.extend(keys)

    # --- the map ------------------------------------------------------------------------------------------------------

    def write(self, key: str, value: Value | None) -> Record:
        """Write, save before it counts, tell."""
        wall = self.wall_ms()
        record = self.map.remove(key, wall) if value is None else self.map.put(key, value, wall)
        if prefix_of(key) in VOLATILE:
            self._save_soon([key])
        else:
            self.disk.records[key] = record
        self.world.written(self, record)
        self.tell(Changed((record,)))
        return record

    def put(self, key: str, value: Value, *, saved: bool = True) -> Record:
        """As `mesh.replicated_store.Records.put`, for what is used of `tars.mesh` itself."""
        return self.write(key, value)

    def remove(self, key: str) -> Record:
        """As `Records.remove`."""
        return self.write(key, None)

    def restore(self, record: Record) -> None:
        """As `Records.restore`; a simulated node has no configuration that could want it."""
        raise NotImplementedError

    def subscribe(self, changed: object) -> None:
        """As `Records.subscribe`; nothing that is used here subscribes."""

    def _records_changed(self, keys: Sequence[str]) -> None:
        self._save_soon(keys)
        mine = ORDERS + self.id
        if any(key == mine or key.startswith((NODE, DEPLOYMENT, MEASURED)) for key in keys):
            self.wake()
        elif self.coordinator == self.id and overrules(self.map, keys, self.id):
            self._due(self.time.now + OVERRULED_SECONDS)

    def _save_soon(self, keys: Sequence[str]) -> None:
        for key in keys:
            volatile = prefix_of(key) in VOLATILE
            unsaved = self._unsaved[volatile]
            if not unsaved:
                self.later(SAVE_VOLATILE_SECONDS if volatile else SAVE_SECONDS, lambda those=unsaved: self._save(those))
            unsaved[key] = None

    def _save(self, unsaved: dict[str, None]) -> None:
        for key in unsaved:
            record = self.map.record(key)
            if record is None:
                self.disk.records.pop(key, None)
            else:
                self.disk.records[key] = record
        unsaved.clear()

    # --- the rounds, as `mesh.coordinator` makes them -----------------------------------------------------------------

    def wake(self) -> None:
        """Ask for a round soon."""
        if not self._round_due:
            self._round_due = True
            self.later(DEBOUNCE_SECONDS, self._round)

    def _round(self) -> None:
        """Tell what is here, decide where it is this node's to decide, and carry its own orders out."""
        self._round_due = False
        self.gateway.fleet_changed()
        if not self.admits(self.id):
            return  # it knows that it was removed
        self._due(self.time.now + ROUND_SECONDS)
        advert = self.advert()
        self._due(self.advertising.tell(advert))
        if self._decides():
            self._decide(advert)
        orders = self._orders()
        if orders is not None:
            self.world.obeys(self)
            self.executor.obey(orders)
        if self.executor.reports() != advert.replicas:
            self._due(self.advertising.tell(replace(advert, replicas=self.executor.reports())))

    def _due(self, when: float | None) -> None:
        """A round at that time at the latest."""
        if when is not None and (when < self._round_at or self._round_at <= self.time.now):
            self._round_at = when
            self.later(when - self.time.now, lambda: self._round_comes(when))

    def _round_comes(self, when: float) -> None:
        if when == self._round_at:
            self._round_at = float("inf")
            self.wake()

    def advert(self) -> NodeAdvert:
        """This node now."""
        snapshot = NodeSnapshot(
            self.id, self.name, self.executor.devices(), draining=self.draining, priority=self.pc.priority
        )
        return NodeAdvert(snapshot, replicas=self.executor.reports())

    def _executor_changed(self, what: str) -> None:
        self.world.log(self.name, "%s", what)
        self._in_process(self.gateway.fleet_changed)()
        self._in_process(self.wake)()

    def _loaded(self, running: Running, device: DeviceSnapshot) -> None:
        """Note what the load really took, for all that have this card."""
        self.later(0.0, lambda: self.measured.learn(running.assignment, device, running.takes))

    def set_draining(self, on: bool) -> None:
        """Somebody wants the PC for himself, or gives it back."""
        self.disk.draining = on
        self.tell(Drain(on))
        self.wake()

    def foreign_changed(self) -> None:
        """A foreign program's memory changed; some later reading of the devices shows it."""
        self.later(0.5, self.wake)

    def _decides(self) -> bool:
        due = self._taking_over.due(self.machine.view(), self.id, self.time.now)
        if due is not None and due > self.time.now:
            self._due(due)
            return False
        return due is not None

    def _decide(self, advert: NodeAdvert) -> None:
        self.decisions += 1
        view = self.coordination_view(advert)
        before, self.decision = self.decision, self.coordination.decide(view)
        self.world.decided(self, view, before, self.decision)
        self._due(self.decision.wake_at)
        for node, assignments in self.decision.orders.items():
            orders = Orders(node, self.id, assignments)
            if orders_for(self.map, node) != orders:
                if not self.admits(node):
                    raise Breach(f"{self.name} gives orders to {node}, which is no member")
                self.orders_written += 1
                self.world.ordered(self, node, assignments)
                self.write(ORDERS + node, orders)

    def _orders(self) -> Sequence[Assignment] | None:
        orders = orders_for(self.map, self.id)
        if orders is None or orders.coordinator != self.coordinator:
            return None
        if self.coordinator == self.id and self.decision is None:
            return None  # its own, of before its restart
        return orders.assignments

    def alive(self) -> list[NodeId]:
        """This node and those that it sees alive, sorted."""
        live = (MemberState.ALIVE, MemberState.SUSPECT, MemberState.DRAINING)
        seen = [member.node for member in self.machine.view().members.values() if member.state in live]
        return sorted([self.id, *seen])

    def coordination_view(self, advert: NodeAdvert) -> CoordinationView:
        """What this node would decide from: its own advert as it is now, the others' as they told them."""
        told = {**adverts(self.map), self.id: advert}
        alive = [node for node in self.alive() if node in told]
        given = {node: orders for node in alive if (orders := orders_for(self.map, node)) is not None}
        wanted = wishes(self.map)
        versions = {name: record.stamp for name in wanted if (record := self.map.record(DEPLOYMENT + name)) is not None}
        return CoordinationView(
            adverts=tuple(told[node] for node in alive),
            wishes=tuple(wanted.values()),
            now=self.time.now,
            orders=given,
            models=self.world.models,
            measured=self.measured.by_key(),
            hub=True,
            versions=versions,
        )

    def seed(self, address: str) -> None:
        self.tell(Seed(address))

    def member_ids(self) -> list[NodeId]:
        """Every member that is not removed, by this node's map."""
        return [member.node for member in members(self.map).values() if not member.removed]
