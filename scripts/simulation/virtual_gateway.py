"""What a simulated node does with calls: the real call machines, routing state and fleet, driven as `tars.serving` drives them.

Law of this file: it decides nothing that the core decides: it performs a machine's effects and tells it what came of them. A call came from
a caller, and then this node is its gateway, or from a peer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from virtual_engine import Sequences, Work
from virtual_fleet import content_of
from virtual_keys import VirtualKeys
from virtual_peers import PING, Forwarded, PeerAttempt, PeerPulse, RemoteReader
from virtual_wire import End, Reply

from tars.core.call_effects import Answer, AskToLoad, CallShape, Effect, Fail, Failure, Start, Stop, Tokens, Wake
from tars.core.call_machine import CallMachine
from tars.core.mesh_messages import MemberState
from tars.core.records import NodeAdvert, Wish
from tars.core.replica_ledger import Observation, Reservation
from tars.core.replicated_map import adverts, wishes
from tars.core.routing import Candidate, Demand
from tars.core.routing_state import RoutingState
from tars.core.types import ModelKind, NodeId
from tars.serving.fleet import Fleet
from tars.serving.mesh_fleet import MeshFleet, Peers

if TYPE_CHECKING:
    from virtual_node import VirtualNode

LEARNED_ANSWERS = 20
"""Answers of each embedding model that a node has seen when it starts: what `LearnedDeadlines` needs before a hedge."""
LEARNED_SECONDS = 0.12


class Reader(Protocol):
    """Who hears what comes of a call."""

    def gave(self, index: int, ids: Sequence[int], file: str) -> None: ...

    def begun_anew(self) -> None:
        """What was given so far is no part of the answer: only told of calls whose caller has not seen it."""

    def answered(self, seen: Observation | None) -> None: ...

    def failed(self, failure: Failure) -> None: ...


class LocalReplicas:
    """This node's part of the real `MeshFleet`, as `LocalFleet` gives it."""

    def __init__(self, node: VirtualNode):
        self._node = node

    def candidates(self, model: str) -> list[Candidate]:
        node = self._node
        standing = MemberState.DRAINING if node.draining else MemberState.ALIVE
        found = []
        for running in node.executor.all():
            assignment = running.assignment
            if assignment.model == model:
                active, queued = node.engine.load(assignment.replica)
                found.append(
                    Candidate(
                        assignment.replica,
                        model,
                        running.kind,
                        running.state,
                        node=node.id,
                        standing=standing,
                        active=active,
                        queued=queued,
                        slots=assignment.settings.slots,
                        file_sha256=content_of(assignment),
                    )
                )
        return found


class MappedPeers:
    """`Peers` as `mesh_fleet.MappedPeers` reads them from the map; nothing is reached through it."""

    def __init__(self, node: VirtualNode):
        self._node = node

    @property
    def version(self) -> int:
        return self._node.map.root

    def adverts(self) -> Mapping[NodeId, NodeAdvert]:
        return adverts(self._node.map)

    def wishes(self) -> Mapping[str, Wish]:
        return wishes(self._node.map)

    def state(self, node: NodeId) -> MemberState | None:
        member = self._node.machine.view().members.get(node)
        return None if member is None else member.state


class VirtualGateway:
    """See the module's law. One per process."""

    def __init__(self, node: VirtualNode):
        self.node = node
        self.dice = random.Random(f"{node.world.seed}/{node.name}/{node.boots}/calls")
        self.state = RoutingState.with_dice(self.dice)
        self.local = LocalReplicas(node)
        self.fleet = MeshFleet(node.id, cast(Fleet, self.local), cast(Peers, MappedPeers(node)))
        self.keys = VirtualKeys(self)
        self.calls: dict[GatewayCall, None] = {}
        """Those that run, in the order in which they came."""
        self._pulses: dict[NodeId, PeerPulse] = {}
        for model, entry in node.world.models.items():
            if entry.kind is not ModelKind.CHAT:
                for _ in range(LEARNED_ANSWERS):
                    self.state.deadlines.saw_answer(model, 4.0, LEARNED_SECONDS, node.time.now)
                    self.state.hedges.answered(4.0)
        node.world.wire.serve(node.pc.address, self._accept, self._asked)

    def take(self, work: Work, reader: Reader) -> GatewayCall:
        """A caller's call. `reader` hears of it."""
        return GatewayCall(self, work, reader, None)

    def fleet_changed(self) -> None:
        """A replica, an advert or a member changed."""
        self.node.engine.check()
        for call in list(self.calls):
            call.perform(call.machine.fleet_changed(self.node.time.now))

    def member_changed(self, node: NodeId, state: MemberState | None) -> None:
        """Membership's word: the calls at a dead peer go on elsewhere, and keys find their new homes."""
        if state is MemberState.DEAD and node in self._pulses:
            self._pulses.pop(node).cut()
        self.keys.members_changed()
        self.fleet_changed()

    def pulse(self, node: NodeId) -> PeerPulse:
        if node not in self._pulses:
            self._pulses[node] = PeerPulse(self, node)
        return self._pulses[node]

    def ask(self, node: NodeId, question: Any, reply: Callable[[Any], None]) -> None:
        """A question to a peer; the reply comes while this process lives. To one that was removed nobody connects."""
        if not self.node.admits(node):
            self.node.later(0.0, lambda: reply(None))
            return
        address = self.node.world.address_of(node)
        self.node.world.wire.ask(self.node.pc.address, address, (self.node.id, question), self.node.hears(reply))

    # --- what peers want ----------------------------------------------------------------------------------------------

    def _accept(self, end: End, request: Forwarded) -> None:
        remote = RemoteReader(end)
        end.lost = self.node.hears(remote.left)
        end.heard = lambda body: None

        def begin(_: object) -> None:
            if not self.node.admits(request.sender):
                end.close()
            elif not end.closed:
                remote.call = GatewayCall(self, request.work, remote, request)

        self.node.hears(begin)(None)

    def _asked(self, asked: tuple[NodeId, Any], reply: Reply) -> None:
        def answer(_: object) -> None:
            sender, question = asked
            if not self.node.admits(sender):
                reply(None)
            elif question is PING:
                reply(PING)
            else:
                self.keys.asked(question, reply)

        self.node.hears(answer)(None)


class GatewayCall:
    """One call at this node, and its machine."""

    def __init__(self, gateway: VirtualGateway, work: Work, reader: Reader, forwarded: Forwarded | None):
        self.work = work
        self.forwarded = forwarded
        self._gateway = gateway
        self._reader = reader
        self._node = gateway.node
        self._running: dict[int, LocalAttempt | PeerAttempt] = {}
        self._wake_at: float | None = None
        self._seen: dict[int, Observation] = {}
        self._whole: dict[int, tuple[int, Sequence[int], str]] = {}
        shape = CallShape(
            work.id,
            work.model,
            work.deadline,
            work.streams,
            demand=Demand(units=float(work.length * work.answers)),
            answers=work.answers,
            forwarded=forwarded is not None,
            shown=work.shown,
            file_sha256=None if forwarded is None else forwarded.file,
        )
        source = gateway.fleet if forwarded is None else gateway.local
        self.machine = CallMachine(shape, gateway.state, lambda: source.candidates(work.model), gateway.dice)
        gateway.calls[self] = None
        self.perform(self.machine.begin(self.now))

    @property
    def now(self) -> float:
        return self._node.time.now

    @property
    def reader(self) -> Reader:
        return self._reader

    def cancel(self) -> None:
        """Whoever wanted it is gone."""
        self.perform(self.machine.cancelled(self.now))

    # --- what attempts tell -------------------------------------------------------------------------------------------

    def gave(self, attempt: int, index: int, ids: Sequence[int], file: str) -> None:
        if attempt not in self._running:
            return
        if self.work.streams:
            self.perform(self.machine.tokens(attempt, index, ids, self.now))
            self._reader.gave(index, ids, file)
        else:
            self._whole[attempt] = index, ids, file  # its one event is the end

    def done(self, attempt: int, seen: Observation) -> None:
        if self._running.pop(attempt, None) is not None:
            self._seen[attempt] = seen
            if not self.work.streams:
                self._reader.gave(*self._whole[attempt])
            self.perform(self.machine.finished(attempt, seen, self.now))

    def broke(self, attempt: int, failure: Failure) -> None:
        if self._running.pop(attempt, None) is not None:
            self._node.world.log(self._node.name, "%s: attempt %d broke: %s", self.work.id, attempt, failure.kind)
            self.perform(self.machine.failed(attempt, failure, self.now))

    # --- effects ------------------------------------------------------------------------------------------------------

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    self._start(effect)
                case Stop(attempt):
                    running = self._running.pop(attempt, None)
                    if running is not None:
                        running.stop()
                case Wake(at):
                    self._wake_at = at
                    self._node.at(at, lambda at=at: self._tick(at))  # type: ignore[misc]
                case AskToLoad():
                    self._node.world.log(self._node.name, "%s waits for a replica", self.work.id)
                case Answer(attempt):
                    self._over()
                    self._reader.answered(self._seen.get(attempt))
                case Fail(failure):
                    self._over()
                    self._reader.failed(failure)
        if self.machine.over:
            self._over()

    def _over(self) -> None:
        if self._gateway.calls.pop(self, self) is None and self.forwarded is None:
            self._node.world.callers.attempted(self.machine)

    def _tick(self, at: float) -> None:
        if at == self._wake_at:
            self._wake_at = None
            self.perform(self.machine.tick(self.now))

    def _start(self, start: Start) -> None:
        reservation = start.reservation
        self._node.world.log(
            self._node.name, "%s: attempt %d at %s %s", self.work.id, start.attempt, reservation.replica,
            self.machine.attempts[start.attempt].because,
        )  # fmt: skip
        attempt = LocalAttempt(self, start.attempt) if reservation.local else PeerAttempt(self, start.attempt)
        self._running[start.attempt] = attempt
        if self.forwarded is not None:
            attempt.begin(reservation, self.forwarded.resume, self.forwarded.saved, self.forwarded.file)
            return
        if start.attempt and start.resume is None:
            self._reader.begun_anew()
        attempt.begin(reservation, start.resume, start.saved, start.file_sha256)

    @property
    def gateway(self) -> VirtualGateway:
        return self._gateway


class LocalAttempt:
    """At a replica of this node: the engine's sink."""

    def __init__(self, call: GatewayCall, number: int):
        self._call = call
        self._number = number
        self._sequences: Sequences

    def begin(
        self, reservation: Reservation, resume: tuple[Tokens, ...] | None, saved: object, file: str | None
    ) -> None:
        engine = self._call.gateway.node.engine
        self._sequences = engine.run(reservation.replica, self._call.work, resume, saved, self)

    def stop(self) -> None:
        self._call.gateway.node.engine.stop(self._sequences)

    def gave(self, index: int, ids: Sequence[int], file: str) -> None:
        self._call.gave(self._number, index, ids, file)

    def done(self, seen: Observation) -> None:
        self._call.done(self._number, seen)

    def broke(self, failure: Failure) -> None:
        self._call.broke(self._number, failure)
