"""One node's part in the mesh as one pure machine: who is there (`membership`), what all know (`replicated_map`), and their news.

Law of this file: `handle(event, now, wall_ms) -> effects`, the same for the driver (`mesh.gossip`) and for the simulation; no I/O, no
clock, dice passed in. An envelope may be lost, doubled or late; nothing here relies on its arrival. Only nodes with a `member/` record that
is not removed are members; what anybody else sends is dropped, unless this node asked at their address itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from tars.core.coordinator_choice import Candidate, coordinator_of, turn_of
from tars.core.membership import Membership, MembershipSettings, Tell
from tars.core.mesh_events import (
    Changed,
    CoordinatorChanged,
    Drain,
    Effect,
    Event,
    Leave,
    Loaded,
    LoadHeard,
    MemberChanged,
    MemberView,
    MeshView,
    NotSent,
    Readdressed,
    Received,
    RecordsChanged,
    Seed,
    Send,
    Stalled,
    Tick,
    Traffic,
)
from tars.core.mesh_messages import Ack, Body, Compare, Envelope, MemberState, News, Ping, Record, Want
from tars.core.probe_order import Dice
from tars.core.reconciliation import Reconciliation
from tars.core.records import Member, NodeAdvert
from tars.core.replicated_map import MEMBER, NODE, ReplicatedMap, prefix_of
from tars.core.timers import Timer, Timers
from tars.core.types import NodeId

__all__ = [
    "Changed",
    "CoordinatorChanged",
    "Drain",
    "Effect",
    "Event",
    "Leave",
    "LoadHeard",
    "Loaded",
    "MemberChanged",
    "MemberView",
    "MeshMachine",
    "MeshSettings",
    "MeshView",
    "NotSent",
    "Readdressed",
    "Received",
    "RecordsChanged",
    "Seed",
    "Send",
    "Stalled",
    "Tick",
    "Traffic",
]

GUEST_SECONDS = 30.0
"""So long a stranger that answered at a seed is listened to: until its records have come and make it a member."""
MOST_GUESTS = 16


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """How the machine behaves. The defaults are for 2 to 1,000 PCs on LANs and tailnets."""

    membership: MembershipSettings = field(default_factory=MembershipSettings)
    addresses: tuple[str, ...] = ()
    """Where peers reach this node, `host:port`, best first."""
    gossip_seconds: float = 0.2
    """Between two rounds of news while there is any; the first round goes at once. memberlist's default for LANs."""
    gossip_peers: int = 3
    """Peers told in a round: with everybody passing it on, 1,000 nodes know in five hops."""
    record_bytes: int = 8_192
    """Of records that ride along in one envelope."""
    stall_seconds: float = 0.25
    """A tick that comes later than that was missed by this node, not by its peers."""


class MeshMachine:
    """`records` is this node's copy of the map, shared with whoever reads and writes it; after a write tell `Changed`."""

    def __init__(self, node: NodeId, records: ReplicatedMap, settings: MeshSettings, dice: Dice):
        self.node = node
        self.records = records
        self._settings = settings
        self._timers = Timers()
        self._membership = Membership(node, settings.membership, dice, self._timers, settings.addresses)
        self._reconciliation = Reconciliation(records)
        self._effects: list[Effect] = []
        self._started = False
        self._excused_until = float("-inf")
        self._round: Timer | None = None
        self._last_round = float("-inf")
        self._guests: dict[NodeId, float] = {}
        self._candidacies: dict[NodeId, tuple[int, bool]] = {}
        self._coordinator: NodeId | None = None
        self._view: MeshView | None = None
        self._viewed: tuple[int, bool, NodeId | None] | None = None

    # --- reading ------------------------------------------------------------------------------------------------------

    def next_due(self, now: float) -> float:
        """When `Tick` is due next, on the clock of `now`; at once before the first event, infinity once there is nothing to do."""
        return self._timers.next_due() if self._started else now

    def view(self) -> MeshView:
        """How this node sees the mesh; the same object until something in it changes."""
        state = (self._membership.version, self._membership.isolated, self._coordinator)
        if self._view is None or self._viewed != state:
            self._viewed = state
            self._view = MeshView(self._membership.members(), self._coordinator, self._membership.isolated)
        return self._view

    @property
    def state(self) -> MemberState:
        """What this node says of itself: ALIVE, DRAINING or LEFT."""
        return self._membership.state

    def alive_since_ms(self, now: float, wall_ms: int) -> Mapping[NodeId, int]:
        """For `ReplicatedMap.collect`: since when each peer has been alive here without a break, in Unix time."""
        return {
            member.node: wall_ms - int((now - member.since) * 1000)
            for member in self._membership.members().values()
            if member.state in (MemberState.ALIVE, MemberState.DRAINING) and member.incarnation >= 0
        }

    # --- the machine --------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float, wall_ms: int) -> list[Effect]:
        """What is to be done about `event`. `now`: seconds on a clock that never goes back; `wall_ms`: Unix time, may be wrong."""
        self._effects = []
        if self._started:
            self._notice_stall(self._timers.next_due(), now)
        else:
            self._start(now)
        match event:
            case Tick():
                self._timers.run(now)
            case Received(envelope=envelope):
                self._receive(envelope, now, wall_ms)
            case NotSent(to=to, number=number):
                self._membership.not_sent(to, number, now)
            case Traffic(node=node):
                self._membership.traffic(node, now)
            case Stalled(seconds=seconds):
                self._notice_stall(now - seconds, now)
            case Changed(records=records):
                self._note(records, now)
            case Seed(address=address):
                self._membership.seed(address, now)
            case Drain(on=on):
                self._membership.drain(on)
                self._decide()
            case Readdressed(addresses=addresses):
                self._membership.readdress(addresses)
            case Loaded(load=load):
                self._membership.prober.load = load
            case Leave():
                self._membership.leave()
                self._decide()
        self._spread(now)
        self._flush()
        return self._effects

    def _start(self, now: float) -> None:
        self._started = True
        self._admit((record.key for record in list(self.records.records())), now)
        self._flush()
        self._decide()
        self._membership.start(now)

    def _notice_stall(self, since: float, now: float) -> None:
        """What was due since then was not done: this node stood still. The same time is never excused twice."""
        seconds = now - max(since, self._excused_until)
        if seconds >= self._settings.stall_seconds:
            self._excused_until = now
            self._membership.excuse(seconds)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _receive(self, envelope: Envelope, now: float, wall_ms: int) -> None:
        sender = envelope.sender
        if sender != self.node and not self._may_speak(envelope, now):
            return
        self._note(self.records.merge(envelope.records, wall_ms), now)
        self._membership.received(envelope, now)
        if sender == self.node:
            return
        body = envelope.body
        if isinstance(body, Compare | Want):
            for packet in self._reconciliation.handle(body):
                self._send(Tell(sender, self._membership.addresses_of(sender), packet.body), packet.records)
        elif isinstance(body, Ping) and self._membership.state_of(sender) is None:
            self._membership.tell(sender, Ack(body.number))  # a guest: the roots must meet
        elif isinstance(body, Ack):
            if body.load:
                self._effects.append(LoadHeard(sender, body.load))
            # Only who asked compares: else both would, over the same difference.
            if (question := self._reconciliation.compare(envelope.root, now)) is not None:
                self._membership.tell(sender, question)

    def _may_speak(self, envelope: Envelope, now: float) -> bool:
        sender = envelope.sender
        if self._membership.state_of(sender) is not None:
            return True
        record = self.records.get(MEMBER + sender)
        if isinstance(record, Member) and record.removed:
            return False
        if self._membership.answers_seed(envelope):
            if len(self._guests) >= MOST_GUESTS:
                del self._guests[next(iter(self._guests))]
            self._guests[sender] = now + GUEST_SECONDS
        return self._guests.get(sender, float("-inf")) >= now

    def _note(self, changed: Iterable[Record], now: float) -> None:
        """These records are new in the map."""
        changed = tuple(changed)
        if not changed:
            return
        self._reconciliation.note(changed)
        keys = tuple(record.key for record in changed)
        self._admit(keys, now)
        self._effects.append(RecordsChanged(keys))

    def _admit(self, keys: Iterable[str], now: float) -> None:
        """Draw what follows from these records for who is a member and who coordinates."""
        differing = []
        for key in keys:
            prefix = prefix_of(key)
            if prefix == MEMBER:
                member = self.records.get(key)
                if isinstance(member, Member) and not member.removed:
                    self._membership.admit(member.node, member.addresses, now)
                    self._guests.pop(member.node, None)
                else:
                    self._membership.expel(NodeId(key.removeprefix(MEMBER)))
            elif prefix == NODE:
                advert = self.records.get(key)
                node = NodeId(key.removeprefix(NODE))
                candidacy = (
                    (advert.node.priority, advert.node.draining) if isinstance(advert, NodeAdvert) else (0, False)
                )
                if self._candidacies.get(node, (0, False)) != candidacy:
                    self._candidacies[node] = candidacy
                    differing.append(node)
        self._reconsider(differing)  # once for all of them: a node that starts among 1,000 hears of each

    # --- what goes out ------------------------------------------------------------------------------------------------

    @property
    def _has_news(self) -> bool:
        membership = self._membership
        return membership.has_news or (self._reconciliation.pending > 0 and membership.live_count > 0)

    def _spread(self, now: float) -> None:
        """See to it that news is told: a round at once, or when the last one is long enough ago."""
        if self._round is None and self._has_news:
            due = self._last_round + self._settings.gossip_seconds
            if due <= now:
                self._tell_news(now)
            else:
                self._round = self._timers.at(due, self._tell_news)

    def _tell_news(self, now: float) -> None:
        self._round, self._last_round = None, now
        self._flush()  # what is said anyway takes its share of the news first
        for peer in self._membership.sample(self._settings.gossip_peers):
            if self._has_news:
                self._send(Tell(peer, self._membership.addresses_of(peer), News()))
        if self._has_news:
            self._round = self._timers.at(now + self._settings.gossip_seconds, self._tell_news)

    def _flush(self) -> None:
        """Turn what the membership wants said and has seen into effects."""
        if not self._membership.outbox:
            return
        changed = []
        for item in self._membership.take():
            if isinstance(item, MemberChanged):
                self._effects.append(item)
                changed.append(item.node)
            else:
                self._send(item)
        self._reconsider(changed)

    def _send(self, tell: Tell, records: tuple[Record, ...] = ()) -> None:
        membership = self._membership
        if not records and tell.to is not None and membership.state_of(tell.to) is not None:
            records = self._reconciliation.rumours(membership.live_count, self._settings.record_bytes)
        updates = membership.updates_for(tell)
        body: Body = tell.body
        envelope = Envelope(
            self.node, membership.incarnation, body, self.records.root, updates, records, membership.gone_hash
        )
        self._effects.append(Send(tell.to, tell.addresses, envelope))

    # --- who coordinates ----------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """See who coordinates, after a change of who is there or of what they say of themselves."""
        membership = self._membership
        candidates = [self._candidate(node) for node in membership.live()]
        if membership.state is not MemberState.LEFT:
            candidates.append(self._candidate(self.node))
        coordinator = coordinator_of(candidates)
        if coordinator != self._coordinator:
            self._coordinator = coordinator
            self._effects.append(CoordinatorChanged(coordinator))

    def _reconsider(self, nodes: Collection[NodeId]) -> None:
        """The same, after a change of these alone: of who comes after the coordinator none matters (1,000 nodes that start hear of each
        other's states a thousand times, and a look at all of them each time would cost their cube).
        """
        if not nodes:
            return
        if (leader := self._coordinator) is not None:
            turn = turn_of(self._candidate(leader))
            if all(turn_of(self._candidate(node)) > turn for node in nodes):  # it is none of them, too
                return
        self._decide()

    def _candidate(self, node: NodeId) -> Candidate:
        state = self._membership.state if node == self.node else self._membership.state_of(node)
        priority, draining = self._candidacies.get(node, (0, False))
        return Candidate(node, priority, draining or state is MemberState.DRAINING)
