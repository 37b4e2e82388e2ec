"""Asking one peer at a time whether it lives: directly, then through others; and helping others to ask.

Law of this file: pure. It knows numbers, deadlines and this node's own health, nothing of what the mesh thinks of a peer: `failed` says
that one did not answer, `membership` decides what that means. Sources: SWIM, section 4.1; Lifeguard, section IV-A (local health, Nacks).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tars.core.mesh_messages import Ack, Body, Nack, Ping, PingRequest
from tars.core.probe_order import ProbeOrder
from tars.core.timers import Timer, Timers
from tars.core.types import NodeId


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """Seconds. Everything else follows from the interval."""

    interval: float = 0.5
    """Between two probes of one node."""
    direct: float = 0.3
    """How long the peer itself has, before others are asked: 1 ms on a LAN, up to 0.2 s through a tailnet's relay."""
    whole: float = 0.8
    """How long a probe takes in all before it has failed."""
    helpers: int = 3
    """Peers that are asked to ask. SWIM: with three, 10 % loss makes a probe fail wrongly once in 130 times."""
    worst_health: int = 3
    """A node that doubts itself probes this many times slower, and one; memberlist allows 8, but a healed node must be quick again."""
    patience: float = 4.0
    """How long who needs a probe's result waits before asking again: a probe of a node that doubts itself takes 3.2."""
    first_burst: int = 8
    """Peers asked at once at the start: a small mesh knows in the first second who is there."""


class Host(Protocol):
    """What probing needs of the membership around it."""

    def tell(self, to: NodeId, body: Body, about: NodeId | None = None) -> None:
        """Send; `about`: with what is known of that node."""

    def is_suspect(self, node: NodeId) -> bool:
        """Whether a peer is under suspicion."""

    def heard(self, node: NodeId) -> float:
        """When the last sign of life came from it."""

    def answered(self, node: NodeId, now: float) -> None:
        """It answered somebody who told this node."""

    def failed(self, node: NodeId, started: float, now: float) -> None:
        """It answered nobody since `started`."""


@dataclass(slots=True)
class _Probe:
    number: int
    target: NodeId
    started: float
    timer: Timer
    helpers: set[NodeId] = field(default_factory=set)
    nacks: set[NodeId] = field(default_factory=set)


@dataclass(slots=True)
class _Relay:
    """A question that this node asks for another."""

    asker: NodeId
    number: int
    target: NodeId
    timer: Timer


class Prober:
    """The probes under way. `load` is what goes into this node's answers."""

    def __init__(self, settings: ProbeSettings, order: ProbeOrder, timers: Timers, host: Host):
        self._settings = settings
        self._order = order
        self._timers = timers
        self._host = host
        self._numbers = 0
        self._probes: dict[int, _Probe] = {}
        self._relays: dict[int, _Relay] = {}
        self._clock: Timer | None = None
        self.health = 0
        """0 is well; each doubt in oneself adds one, each answered probe takes one off."""
        self.load: tuple[tuple[str, int, int], ...] = ()

    def number(self) -> int:
        """A number that no other question of this node bears."""
        self._numbers += 1
        return self._numbers

    @property
    def _slowness(self) -> int:
        return 1 + self.health

    def doubt(self, by: int) -> None:
        """This node has a reason to doubt itself (positive), or one less (negative)."""
        self.health = min(self._settings.worst_health, max(0, self.health + by))

    def start(self, now: float, phase: float) -> None:
        """Begin; `phase` in [0, 1) spreads nodes that start together."""
        for node in self._order.sample(self._settings.first_burst):
            self.probe(node, now)
        self._clock = self._timers.at(now + self._settings.interval * phase, self._next)

    def stop(self) -> None:
        """Ask nobody any more; answer still."""
        if self._clock is not None:
            self._clock.cancelled = True
        for probe in self._probes.values():
            probe.timer.cancelled = True
        self._probes.clear()

    def excuse(self, seconds: float) -> None:
        """Time that this node was not able to listen does not count against anybody."""
        for timer in [probe.timer for probe in self._probes.values()] + [
            relay.timer for relay in self._relays.values()
        ]:
            timer.due += seconds
        self.doubt(1)

    # --- asking -------------------------------------------------------------------------------------------------------

    def _next(self, now: float) -> None:
        self._probe_next(now)
        self._clock = self._timers.at(now + self._settings.interval * self._slowness, self._next)

    def _probe_next(self, now: float) -> None:
        if (target := self._order.next(self._host.is_suspect)) is not None:
            self.probe(target, now)

    def probe(self, target: NodeId, now: float) -> None:
        """Ask `target`, out of turn; nothing where it is being asked already."""
        if any(probe.target == target for probe in self._probes.values()):
            return
        number = self.number()
        timer = self._timers.at(now + self._settings.direct * self._slowness, lambda at: self._ask_others(number, at))
        self._probes[number] = _Probe(number, target, now, timer)
        self._host.tell(target, Ping(number))

    def _ask_others(self, number: int, now: float) -> None:
        probe = self._probes[number]
        probe.timer.cancelled = True
        ends = max(now, probe.started + self._settings.whole * self._slowness)
        probe.timer = self._timers.at(ends, lambda at: self._end(number, at))
        probe.helpers = set(self._order.sample(self._settings.helpers, (probe.target,)))
        for helper in sorted(probe.helpers):
            self._host.tell(helper, PingRequest(number, probe.target))

    def _end(self, number: int, now: float) -> None:
        probe = self._probes.pop(number)
        probe.timer.cancelled = True
        if self._host.heard(probe.target) >= probe.started:
            return  # it spoke, only not to the point
        self.doubt(len(probe.helpers) - len(probe.nacks) if probe.helpers else 1)
        self._host.failed(probe.target, probe.started, now)

    # --- answers ------------------------------------------------------------------------------------------------------

    def asked(self, sender: NodeId, body: Ping | PingRequest, now: float, known: bool) -> None:
        """A question came. `known`: whether the target of a `PingRequest` is a member here."""
        if isinstance(body, Ping):
            self._host.tell(sender, Ack(body.number, self.load))
        elif not known:
            self._host.tell(sender, Nack(body.number))
        else:
            number = self.number()
            timer = self._timers.at(now + self._settings.direct, lambda at: self._give_up_relay(number))
            self._relays[number] = _Relay(sender, body.number, body.target, timer)
            self._host.tell(body.target, Ping(number))

    def got_ack(self, number: int, sender: NodeId, now: float) -> None:
        """Somebody answered; a number that is not waited for (late, doubled) is nothing but a sign of the sender's life."""
        relay = self._relays.get(number)
        if relay is not None and relay.target == sender:
            del self._relays[number]
            relay.timer.cancelled = True
            self._host.tell(relay.asker, Ack(relay.number, self.load), about=relay.target)
        probe = self._probes.get(number)
        if probe is not None and (sender == probe.target or sender in probe.helpers):
            del self._probes[number]
            probe.timer.cancelled = True
            self.doubt(-1)
            self._host.answered(probe.target, now)

    def got_nack(self, number: int, sender: NodeId, now: float) -> None:
        """A helper lives and its question was not answered. When all say so there is nothing more to wait for."""
        probe = self._probes.get(number)
        if probe is None or sender not in probe.helpers:
            return
        probe.nacks.add(sender)
        if len(probe.nacks) == len(probe.helpers):
            self._end(number, now)

    def not_sent(self, to: NodeId | None, number: int, now: float) -> None:
        """A question did not reach its addressee: no need to wait for the answer."""
        relay = self._relays.get(number)
        if relay is not None and relay.target == to:
            relay.timer.cancelled = True
            self._give_up_relay(number)
        probe = self._probes.get(number)
        if probe is not None and probe.target == to and not probe.helpers:
            self._ask_others(number, now)

    def _give_up_relay(self, number: int) -> None:
        relay = self._relays.pop(number)
        self._host.tell(relay.asker, Nack(relay.number))
