"""Calls of one simulated node at others: the attempt here, the call there, and the pulse that is felt meanwhile.

Law of this file: what goes over a connection, as `serving.peer_target` and `serving.peer_pulses` have it; whether and where a call is tried
is its machine's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from virtual_engine import Work
from virtual_wire import End

from tars.core.call_effects import Failure, Tokens
from tars.core.pulse import Cut, Pulse, PulseEffect, SendPing
from tars.core.replica_ledger import Observation, Reservation
from tars.core.types import NodeId

if TYPE_CHECKING:
    from virtual_gateway import GatewayCall, VirtualGateway

PING = "ping"


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A call on its way to a peer."""

    sender: NodeId
    work: Work
    resume: tuple[Tokens, ...] | None
    saved: object
    file: str | None


class PeerAttempt:
    """At a peer, on a connection of its own; the peer's pulse is felt meanwhile."""

    def __init__(self, call: GatewayCall, number: int):
        self._call = call
        self._number = number
        self._end: End
        self._pulse: PeerPulse

    def begin(
        self, reservation: Reservation, resume: tuple[Tokens, ...] | None, saved: object, file: str | None
    ) -> None:
        gateway = self._call.gateway
        node, world = gateway.node, gateway.node.world
        request = Forwarded(node.id, self._call.work, resume, saved, file)
        self._pulse = gateway.pulse(reservation.node)
        address = world.address_of(reservation.node)
        self._end = world.wire.connect(
            node.pc.address, address, request, node.hears(self._heard), node.hears(self._lost)
        )
        self._pulse.began(self)

    def stop(self) -> None:
        self._end.close()
        self._pulse.ended(self)

    def silent(self) -> None:
        """The mesh knows that it is dead or frozen."""
        self._end.close()
        self._call.broke(self._number, Failure("peer_unreachable", sent=True, known=True))

    def _heard(self, body: tuple[Any, ...]) -> None:
        if self._end.closed:
            return
        self._pulse.heard()
        match body:
            case ("gave", index, ids, file):
                self._call.gave(self._number, index, ids, file)
            case ("done", seen):
                self.stop()
                self._call.done(self._number, seen)
            case ("failed", failure):
                self.stop()
                self._call.broke(self._number, failure)

    def _lost(self, sent: bool) -> None:
        self._pulse.ended(self)
        self._call.broke(self._number, Failure("peer_unreachable", sent=sent))


class RemoteReader:
    """The gateway of a forwarded call, at the other end of a connection."""

    def __init__(self, end: End):
        self._end = end
        self.call: GatewayCall | None = None

    def gave(self, index: int, ids: Sequence[int], file: str) -> None:
        self._end.say(("gave", index, ids, file))

    def begun_anew(self) -> None:
        """Never: a forwarded call is tried where it is, or not at all."""

    def answered(self, seen: Observation | None) -> None:
        self._end.say(("done", seen))

    def failed(self, failure: Failure) -> None:
        self._end.say(("failed", failure))

    def left(self, sent: bool) -> None:
        """The gateway does not want it any more, or is gone."""
        if self.call is not None:
            self.call.cancel()


class PeerPulse:
    """One peer's `Pulse`, and the attempts that hang on it, as `serving.peer_pulses` drives it."""

    def __init__(self, gateway: VirtualGateway, peer: NodeId):
        self._gateway = gateway
        self._peer = peer
        self._pulse = Pulse(gateway.node.time.now)
        self._attempts: dict[PeerAttempt, None] = {}
        self._wake: float | None = None

    def began(self, attempt: PeerAttempt) -> None:
        self._attempts[attempt] = None
        self._perform(self._pulse.call_began(self._now))

    def ended(self, attempt: PeerAttempt) -> None:
        if self._attempts.pop(attempt, attempt) is None:
            self._perform(self._pulse.call_ended(self._now))

    def heard(self) -> None:
        self._perform(self._pulse.heard(self._now))

    def cut(self) -> None:
        """Every call there goes on elsewhere."""
        for attempt in list(self._attempts):
            self.ended(attempt)
            attempt.silent()

    @property
    def _now(self) -> float:
        return self._gateway.node.time.now

    def _perform(self, effects: Sequence[PulseEffect]) -> None:
        for effect in effects:
            match effect:
                case SendPing(number):
                    self._gateway.ask(self._peer, PING, lambda reply, number=number: self._answered(number, reply))  # type: ignore[misc]
                case Cut():
                    self._gateway.state.ledger.failed(self._peer, 5.0, self._now)
                    self.cut()
                case _:
                    self._gateway.state.ledger.works(self._peer)
        wake = self._pulse.wake
        if wake is not None and wake != self._wake:
            self._wake = wake
            self._gateway.node.at(wake, lambda: self._tick(wake))

    def _answered(self, number: int, reply: object) -> None:
        if reply is None:
            self._pulse.unanswered(number)
        else:
            self._perform(self._pulse.answered(number, self._now))

    def _tick(self, wake: float) -> None:
        if wake == self._wake:
            self._wake = None
            self._perform(self._pulse.tick(self._now))
