"""One simulated node: the real machines of `tars.core`, driven as `tars.mesh` drives them, on virtual time, with a disk that can be lost.

Law of this file: it decides nothing that the core decides. What the drivers of `tars.mesh` add (saving before it counts, obeying only
one's own coordinator, one advert a second) it does in the same order; everything that could go wrong is done to it from outside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from breach import Breach
from virtual_executor import Running, VirtualExecutor
from virtual_fleet import Pc
from virtual_network import Answer

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
from tars.core.records import MeasuredLoad, Member, NodeAdvert, Orders, Value
from tars.core.replicated_map import (
    DEPLOYMENT,
    MEASURED,
    MEMBER,
    NODE,
    ORDERS,
    VOLATILE,
    ReplicatedMap,
    adverts,
    measured,
    measured_key,
    members,
    orders_for,
    prefix_of,
    wishes,
)
from tars.core.types import Assignment, DeviceSnapshot, NodeId, NodeSnapshot, ReplicaId

if TYPE_CHECKING:
    from world import World

SAVE_SECONDS = 2.0
"""What was heard is on the disk so much later (`mesh.replicated_store`: 5 s)."""
SAVE_VOLATILE_SECONDS = 12.0
"""What nodes say of themselves, and orders, are on the disk so much later (there: 60 s)."""
ADVERT_SECONDS = 1.0
"""Between two adverts of one node."""
ADVERT_SHARE = 0.02
ADVERT_BYTES = 256 * 2**20
"""A device's memory that moved by less than both publishes nothing."""
DECIDE_SECONDS = 0.05
"""News that come together make one decision."""


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
        self.left = False
        """It said good-bye, and is down."""
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
        self.coordinator: NodeId | None = None
        self.last_decision: Decision | None = None
        self._tick_at = float("inf")
        self._unsaved: tuple[dict[str, None], dict[str, None]] = ({}, {})
        """Durable keys, volatile keys."""
        self._advert_at = float("-inf")
        self._advert_due = False
        self._decide_due = False
        self._decide_at = float("inf")
        self.world.network.listen(self.pc.address, self._serve)
        self.world.log(self.name, "starts as %s with %d records", self.id, len(self.map))
        if self.draining:
            self.tell(Drain(True))
        self.tell(Tick())
        self._advertise()
        self.wake()

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

    def leave(self) -> None:
        """Say good-bye and end."""
        self.tell(Leave())
        for unsaved in self._unsaved:
            self._save(unsaved)
        self.left = True
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
                    if effect.to in (None, answer.sender) and self._admits(answer.sender):
                        self.world.received(self, answer)
                        self.tell(Received(answer))

        self.world.network.exchange(self.pc.address, address, effect.envelope, done)

    def _not_sent(self, effect: Send) -> None:
        self.tell(NotSent(effect.to, getattr(effect.envelope.body, "number", None)))

    def _serve(self, envelope: Envelope, answer: Answer) -> None:
        if self.power is Power.PAUSED:
            self.backlog.append(lambda: self._serve(envelope, answer))
        elif not self._admits(envelope.sender):
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

    def _admits(self, node: NodeId) -> bool:
        """What the certificate and the map say: a member, not removed."""
        member = self.map.get(MEMBER + node)
        return isinstance(member, Member) and not member.removed

    def _note(self, effect: Effect, changed: list[str]) -> None:
        match effect:
            case MemberChanged(node, before, after):
                self.world.member_changed(self, node, before, after)
                self.wake()
            case CoordinatorChanged(node):
                self.world.log(self.name, "takes %s for the coordinator", self.world.name_of(node))
                self.coordinator = node
                self._obey()
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

    def _records_changed(self, keys: Sequence[str]) -> None:
        self._save_soon(keys)
        prefixes = {prefix_of(key) for key in keys}
        if ORDERS + self.id in keys:
            self._obey()
        if NODE + self.id in keys:
            self._advertise()  # perhaps an older word of this very node came back
        if not prefixes.isdisjoint((NODE, DEPLOYMENT, MEASURED, MEMBER, ORDERS)):
            self.wake()

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

    # --- what this node says of itself --------------------------------------------------------------------------------

    def advert(self) -> NodeAdvert:
        snapshot = NodeSnapshot(
            self.id, self.name, self.executor.devices(), draining=self.draining, priority=self.pc.priority
        )
        return NodeAdvert(snapshot, replicas=self.executor.reports())

    def _advertise(self) -> None:
        """Publish now, or as soon as a second has passed since the last time, where something is different."""
        if self._advert_due:
            return
        wait = self._advert_at + ADVERT_SECONDS - self.time.now
        if wait > 0:
            self._advert_due = True
            self.later(wait, self._publish)
        else:
            self._publish()

    def _publish(self) -> None:
        self._advert_due = False
        if not self._admits(self.id):
            return  # it knows that it was removed
        fresh = self.advert()
        told = self.map.get(NODE + self.id)
        if isinstance(told, NodeAdvert) and not _differs(told, fresh):
            return
        self._advert_at = self.time.now
        self.write(NODE + self.id, fresh)

    def _executor_changed(self, what: str) -> None:
        self.world.log(self.name, "%s", what)
        if self.power is Power.PAUSED:
            self.backlog.append(self._in_process(self._after_change))
        else:
            # Not at once: what was done just now is done to the end first.
            self.later(0.0, self._after_change)

    def _after_change(self) -> None:
        self._obey()
        self._advertise()

    def _loaded(self, running: Running, device: DeviceSnapshot) -> None:
        """Note what the load really took, for all that have this card."""
        assignment = running.assignment
        settings = assignment.settings
        load = MeasuredLoad(
            card=self.world.card_of(device),
            file=f"{assignment.model}:{assignment.variant}:{int(assignment.memory.weights)}",
            context=settings.context,
            slots=settings.slots,
            kv_tokens=settings.kv_tokens,
            kv_type=settings.kv_type,
            gpu_layers=settings.gpu_layers,
            taken=running.takes,
        )
        known = self.map.get(measured_key(load))
        if known != load:
            self.later(0.0, lambda: self.write(measured_key(load), load) and None)

    def set_draining(self, on: bool) -> None:
        """Somebody wants the PC for himself, or gives it back."""
        self.disk.draining = on
        self.tell(Drain(on))
        self._advertise()

    def foreign_changed(self) -> None:
        """A foreign program's memory changed; the next reading of the devices shows it."""
        self.later(0.5, self._advertise)

    # --- orders -------------------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        orders = orders_for(self.map, self.id)
        if orders is not None and orders.coordinator == self.coordinator:
            self.executor.obey(orders.assignments)

    def wake(self) -> None:
        """Decide soon, where this node coordinates."""
        if not self._decide_due:
            self._decide_due = True
            self.later(DECIDE_SECONDS, self._decide)

    def _decide(self) -> None:
        self._decide_due = False
        if self.coordinator != self.id or not self._admits(self.id):
            return
        self.decisions += 1
        view = self.coordination_view()
        before = self.last_decision
        decision = self.coordination.decide(view)
        self.last_decision = decision
        self.world.decided(self, view, before, decision)
        for node, assignments in decision.orders.items():
            told = orders_for(self.map, node)
            if told is None or told.coordinator != self.id or _loads(told.assignments) != _loads(assignments):
                if not self._admits(node):
                    raise Breach(f"{self.name} gives orders to {node}, which is no member")
                self.orders_written += 1
                self.world.ordered(self, node, assignments)
                self.write(ORDERS + node, Orders(node, self.id, assignments))
        if decision.wake_at is not None and decision.wake_at < self._decide_at:
            self._decide_at = decision.wake_at
            self.later(max(0.0, decision.wake_at - self.time.now), self._wake_due)

    def _wake_due(self) -> None:
        self._decide_at = float("inf")
        self.wake()

    def alive(self) -> list[NodeId]:
        """This node and those that it sees alive, sorted."""
        live = (MemberState.ALIVE, MemberState.SUSPECT, MemberState.DRAINING)
        seen = [member.node for member in self.machine.view().members.values() if member.state in live]
        return sorted([self.id, *seen])

    def coordination_view(self) -> CoordinationView:
        told = adverts(self.map)
        alive = [node for node in self.alive() if node in told]
        given = {node: orders for node in alive if (orders := orders_for(self.map, node)) is not None}
        return CoordinationView(
            adverts=tuple(told[node] for node in alive),
            wishes=tuple(wishes(self.map).values()),
            now=self.time.now,
            orders=given,
            models=self.world.models,
            measured=self.world.measured_for([told[node] for node in alive], measured(self.map)),
            hub=True,
            versions={
                key.removeprefix(DEPLOYMENT): record.stamp
                for key, record in (
                    (DEPLOYMENT + name, self.map.record(DEPLOYMENT + name)) for name in wishes(self.map)
                )
                if record is not None
            },
        )

    def seed(self, address: str) -> None:
        self.tell(Seed(address))

    def member_ids(self) -> list[NodeId]:
        """Every member that is not removed, by this node's map."""
        return [member.node for member in members(self.map).values() if not member.removed]


def _loads(assignments: Sequence[Assignment]) -> dict[ReplicaId, tuple[object, ...]]:
    """What of orders a node acts upon: not the words."""
    return {each.replica: (each.variant, each.device, each.settings) for each in assignments}


def _differs(told: NodeAdvert, fresh: NodeAdvert) -> bool:
    """Whether others would do something else for it: any difference but a little memory."""
    if told.replicas != fresh.replicas or len(told.node.devices) != len(fresh.node.devices):
        return True
    levelled = []
    for before, after in zip(told.node.devices, fresh.node.devices, strict=True):
        moved = abs((before.memory_free + before.memory_held) - (after.memory_free + after.memory_held))
        small = moved < max(ADVERT_BYTES, ADVERT_SHARE * after.memory_total)
        if small:
            after = replace(after, memory_free=before.memory_free, memory_held=before.memory_held)
        levelled.append(after)
    return replace(fresh.node, devices=tuple(levelled)) != told.node
