"""Who is there: each node's own opinion of every other, kept true by probes and by what the others say.

Law of this file: a pure state machine; it knows no records, no roots and no sockets, and puts what it wants said into `outbox`. SWIM (Das,
Gupta, Motivala, 2002): incarnations, suspicion, news that rides along. Lifeguard (Dadgar, Phillips, Currey, 2017): suspicions that
others confirm are shorter, a node that does badly doubts itself first. Beyond them:
- A peer whose state is not ALIVE here is told so whenever it is spoken to, so that it can refute; the dead are tried now and then, so that
  the halves of a partition find each other again.
- Only a node whose own probe failed declares death; who merely heard of the suspicion waits half as long again, then probes itself.
- Who is held for dead or gone is compared by a hash in each envelope, so that news that somebody missed comes to him after all.
- A node that hears nobody at all, where it should hear two or more, takes itself for cut off and waits three times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b

from tars.core.member_rumours import MemberRumours
from tars.core.mesh_events import MemberChanged, MemberView
from tars.core.mesh_messages import Ack, Body, Envelope, MemberState, Nack, News, Ping, PingRequest, Update
from tars.core.probe_order import Dice, ProbeOrder
from tars.core.probing import Prober, ProbeSettings
from tars.core.suspicion import overrules, suspicion_seconds
from tars.core.timers import Timer, Timers
from tars.core.types import NodeId

LIVE = frozenset({MemberState.ALIVE, MemberState.SUSPECT, MemberState.DRAINING})
"""States of peers that are probed and told things. A SUSPECT is not yet held for dead."""
OWN = frozenset({MemberState.ALIVE, MemberState.DRAINING, MemberState.LEFT})
"""States that a node claims for itself."""
UNHEARD = -1
"""The incarnation of a peer that nobody has said anything about."""
MOST_ADDRESSES = 16
MOST_SEEDS = 64
MOST_UPDATES = 256
"""In one envelope."""


@dataclass(frozen=True, slots=True)
class MembershipSettings:
    """Seconds. A dead node is known everywhere after ring probe (at most 1.0), whole probe (0.8), suspicion (1.8 to 2.6), news (0.5)."""

    probing: ProbeSettings = field(default_factory=ProbeSettings)
    shortest_suspicion: float = 1.8
    """With the probe before it 2.6: a node whose loop stands still for 2 s refutes in time."""
    longest_suspicion: float = 2.6
    confirmations: int = 3
    """Further accusers that make a suspicion shortest (Lifeguard)."""
    hearsay: float = 1.5
    """How many times longer a suspicion lasts where it was only heard of: the accuser's word or the refutation comes before."""
    isolation: float = 3.0
    """How many times longer suspicions last while nobody at all is heard."""
    retry: float = 2.0
    """Between two tries to find a dead peer or a seed again."""
    retries_for_each: int = 4
    """So many of all live nodes try one dead peer in each `retry`, however many they are."""
    compare: float = 2.0
    """Between two comparisons of whom this node and another hold for gone."""
    updates: int = 12
    """News about others in one envelope, about 1 KiB."""
    farewells: int = 64
    """Peers that a leaving node tells itself."""

    @staticmethod
    def paced(probe_seconds: float) -> MembershipSettings:
        """The defaults, faster or slower as a whole; 0.5 gives the defaults themselves."""
        factor, usual = probe_seconds / 0.5, MembershipSettings()
        probing = replace(
            usual.probing,
            interval=probe_seconds,
            direct=usual.probing.direct * factor,
            whole=usual.probing.whole * factor,
        )
        return replace(
            usual,
            probing=probing,
            shortest_suspicion=usual.shortest_suspicion * factor,
            longest_suspicion=usual.longest_suspicion * factor,
            retry=usual.retry * factor,
            compare=usual.compare * factor,
        )


@dataclass(frozen=True, slots=True)
class Tell:
    """Say `body` to `to`, or to whoever is at `addresses`. `about`: with the state of that node. `more` goes along too."""

    to: NodeId | None
    addresses: tuple[str, ...]
    body: Body
    about: NodeId | None = None
    more: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could coordinate."""

    node: NodeId
    priority: int = 0
    draining: bool = False


def coordinator_of(candidates: Iterable[Candidate]) -> NodeId | None:
    """The first by (highest priority, NodeId); one that drains only where nobody else is left. Nodes that see the same say the same."""
    first = min(candidates, key=lambda each: (each.draining, -each.priority, each.node), default=None)
    return None if first is None else first.node


@lru_cache(maxsize=4096)
def _hash_of(node: NodeId) -> int:
    return int.from_bytes(blake2b(node.encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(slots=True)
class _Suspicion:
    started: float
    accusers: set[NodeId]
    timer: Timer
    mine: bool = False
    """This node's own probe failed."""
    private: bool = False
    """It follows from a death that was told here out of the blue: nobody is told before this node has seen for itself."""
    check: Timer | None = None


@dataclass(slots=True)
class _Peer:
    node: NodeId
    state: MemberState
    incarnation: int
    since: float
    recorded: tuple[str, ...]
    told: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    heard: float = float("-inf")
    corrected: float = float("-inf")
    behind: bool = False
    """It spoke with a lower incarnation than it had: it has forgotten an earlier life, and must be told."""
    suspicion: _Suspicion | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.told, *self.recorded, *self.found)))[:MOST_ADDRESSES]

    @property
    def must_be_told(self) -> bool:
        return self.behind or self.state not in OWN or self.state is MemberState.LEFT


class Membership:
    """One node's view. Every method that takes `now` may add to `outbox`, which whoever calls empties by `take`."""

    def __init__(
        self, node: NodeId, settings: MembershipSettings, dice: Dice, timers: Timers, addresses: tuple[str, ...] = ()
    ):
        self.node = node
        self.state = MemberState.ALIVE
        self.incarnation = 0
        self.isolated = False
        self.version = 0
        """Another one whenever `members` would give something else."""
        self.outbox: list[Tell | MemberChanged] = []
        self._settings = settings
        self._dice = dice
        self._timers = timers
        self._addresses = addresses
        self._peers: dict[NodeId, _Peer] = {}
        self._live = ProbeOrder(node, dice)
        self._gone: dict[NodeId, None] = {}
        self.gone_hash = 0
        """Over the peers that are held for dead or gone; equal on all nodes that agree."""
        self._compare_at = float("-inf")
        self._rumours = MemberRumours()
        self._seeds: dict[str, NodeId | None] = {}
        self._asked_seeds: dict[int, str] = {}
        self._heard_anybody = float("-inf")
        self._silent: set[NodeId] = set()
        self.prober = Prober(settings.probing, self._live, timers, self)

    # --- reading ------------------------------------------------------------------------------------------------------

    def members(self) -> Mapping[NodeId, MemberView]:
        """Every peer; a new mapping each time."""
        return {
            peer.node: MemberView(peer.node, peer.state, peer.incarnation, peer.addresses, peer.since)
            for peer in self._peers.values()
        }

    def state_of(self, node: NodeId) -> MemberState | None:
        """How a peer is seen; None where it is no member."""
        peer = self._peers.get(node)
        return None if peer is None else peer.state

    def live(self) -> Iterable[NodeId]:
        """Peers that are not held for dead or gone."""
        return (node for node in self._peers if node not in self._gone)

    @property
    def live_count(self) -> int:
        """How many those are."""
        return len(self._live)

    @property
    def has_news(self) -> bool:
        """Whether something about members is still to be told."""
        return len(self._rumours) > 0 and len(self._live) > 0

    def sample(self, most: int) -> list[NodeId]:
        """Live peers at random."""
        return self._live.sample(most)

    def addresses_of(self, node: NodeId) -> tuple[str, ...]:
        """Where a peer may be."""
        peer = self._peers.get(node)
        return () if peer is None else peer.addresses

    def heard(self, node: NodeId) -> float:
        """When the last sign of life came from a peer."""
        peer = self._peers.get(node)
        return float("-inf") if peer is None else peer.heard

    def is_suspect(self, node: NodeId) -> bool:
        """Whether a peer is under suspicion here."""
        return self.state_of(node) is MemberState.SUSPECT

    def take(self) -> list[Tell | MemberChanged]:
        """What is to be said and what has changed, since the last time."""
        taken, self.outbox = self.outbox, []
        return taken

    def updates_for(self, tell: Tell) -> tuple[Update, ...]:
        """What rides along: this node itself, what the addressee must hear about itself, then news. What is taken counts as told."""
        updates = [self._own_update(), *tell.more]
        if tell.to is None:
            return tuple(updates)  # whoever that is need not know more yet
        if (to := self._peers.get(tell.to)) is not None and to.must_be_told:
            updates.append(self._update(to))
            to.behind = False
        if tell.about is not None and (about := self._peers.get(tell.about)) is not None:
            updates.append(self._update(about))
        room = max(0, min(self._settings.updates, MOST_UPDATES - len(updates)))
        named = {update.node for update in updates if update.node != self.node}
        news = self._rumours.take(room, len(self._live), named | {tell.to})
        return (*updates, *(update for update in news if update.node != self.node))

    def _own_update(self) -> Update:
        return Update(self.node, self.incarnation, self.state, self._addresses)

    def _update(self, peer: _Peer) -> Update:
        accuser = min(peer.suspicion.accusers, default=None) if peer.suspicion is not None else None
        return Update(peer.node, max(0, peer.incarnation), peer.state, peer.told, accuser)

    # --- who may be a member ------------------------------------------------------------------------------------------

    def admit(self, node: NodeId, addresses: tuple[str, ...], now: float) -> None:
        """A record says that `node` is a member, and where it was. It is presumed alive until it fails to answer."""
        if node == self.node:
            return
        if (peer := self._peers.get(node)) is not None:
            peer.recorded = addresses
            self.version += 1
            return
        self.version += 1
        self._peers[node] = _Peer(node, MemberState.ALIVE, UNHEARD, now, addresses)
        self._live.add(node)
        self.outbox.append(MemberChanged(node, None, MemberState.ALIVE))

    def expel(self, node: NodeId) -> None:
        """It is no member any more; nothing that it says counts."""
        if (peer := self._peers.pop(node, None)) is None:
            return
        self.version += 1
        self._end_suspicion(peer)
        self._live.remove(node)
        self._set_gone(node, False)
        self._rumours.forget(node)
        self._silent.discard(node)
        self.outbox.append(MemberChanged(node, peer.state, None))

    # --- this node itself ---------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Begin to probe."""
        self._heard_anybody = now
        self.prober.start(now, self._dice.random())
        self._timers.at(now + self._settings.retry * (0.5 + self._dice.random() / 2), self._retry)

    def seed(self, address: str, now: float) -> None:
        """Somebody may be there."""
        if address in self._seeds or address in self._addresses:
            return
        if len(self._seeds) >= MOST_SEEDS:
            del self._seeds[next(iter(self._seeds))]
        self._seeds[address] = None
        self._ask_seed(address)

    def drain(self, on: bool) -> None:
        """Take no new work, or take it again."""
        state = MemberState.DRAINING if on else MemberState.ALIVE
        if self.state not in (state, MemberState.LEFT):
            self.state = state
            self._announce(self.incarnation + 1)

    def readdress(self, addresses: tuple[str, ...]) -> None:
        """Reachable there from now on."""
        if addresses != self._addresses:
            self._addresses = addresses
            self._announce(self.incarnation + 1)

    def leave(self) -> None:
        """Go, and say so to as many as a packet each may cost; they tell the others."""
        if self.state is MemberState.LEFT:
            return
        self.state = MemberState.LEFT
        self._announce(self.incarnation + 1)
        self.prober.stop()
        for peer in self._peers.values():
            self._end_suspicion(peer)
        for node in self.sample(self._settings.farewells):
            self.tell(node, News())

    def excuse(self, seconds: float) -> None:
        """This node was not able to listen for so long, up to now: nobody's time ran."""
        self.prober.excuse(seconds)
        for peer in self._peers.values():
            if peer.suspicion is not None:
                peer.suspicion.started += seconds
                peer.suspicion.timer.due += seconds

    def _announce(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self._rumours.add(self._own_update())

    # --- what comes in ------------------------------------------------------------------------------------------------

    def answers_seed(self, envelope: Envelope) -> bool:
        """Whether this answers a question that was put to an address."""
        return isinstance(envelope.body, Ack) and envelope.body.number in self._asked_seeds

    def received(self, envelope: Envelope, now: float) -> None:
        """An envelope from a member, or from this node itself (a seed was its own address)."""
        sender, body = envelope.sender, envelope.body
        if isinstance(body, Ack) and (address := self._asked_seeds.pop(body.number, None)) is not None:
            self._found(address, sender)
        if sender == self.node:
            if isinstance(body, Ping):
                self.tell(sender, Ack(body.number))
            return
        peer = self._peers.get(sender)
        if peer is None:
            return
        self._sign_of_life(peer, now)
        self._hear_itself(peer, envelope, now)
        newer = []
        for update in envelope.updates:
            if update.node == self.node:
                self._hear_about_me(update, sender, isinstance(body, Ping))
            elif update.node != sender and (better := self._hear_about(update, now)) is not None:
                newer.append(better)
        if newer:
            self.outbox.append(Tell(sender, peer.addresses, News(), more=tuple(newer)))
        match body:
            case Ping():
                self.prober.asked(sender, body, now, True)
                self._compare_gone(envelope.gone, peer, now)
            case PingRequest(target=target):
                self.prober.asked(sender, body, now, target in self._peers)
            case Ack():
                self.prober.got_ack(body.number, sender, now)
                self._compare_gone(envelope.gone, peer, now)
            case Nack():
                self.prober.got_nack(body.number, sender, now)
        if not isinstance(body, Ping):  # its answer tells it already
            self._correct(peer, now)

    def not_sent(self, to: NodeId | None, number: int | None, now: float) -> None:
        """An envelope did not reach its addressee."""
        if number is not None:
            self._asked_seeds.pop(number, None)
            self.prober.not_sent(to, number, now)

    def traffic(self, node: NodeId, now: float) -> None:
        """Something else came from a peer."""
        if (peer := self._peers.get(node)) is not None:
            self._sign_of_life(peer, now)
            self._correct(peer, now)

    def _sign_of_life(self, peer: _Peer, now: float) -> None:
        peer.heard = self._heard_anybody = now
        self._silent.clear()
        if self.isolated:
            self.isolated = False
            for other in self._peers.values():  # their time to refute begins now that they can be heard
                self._restart(other, now)
        self._restart(peer, now)

    @staticmethod
    def _restart(peer: _Peer, now: float) -> None:
        if peer.suspicion is not None:
            peer.suspicion.started = now

    def _hear_itself(self, peer: _Peer, envelope: Envelope, now: float) -> None:
        """What a peer says of itself, at first hand."""
        for update in envelope.updates:
            if update.node == peer.node and update.incarnation == envelope.incarnation and update.state in OWN:
                state, addresses = update.state, update.addresses
                break
        else:
            state, addresses = MemberState.ALIVE, peer.told
        peer.behind = envelope.incarnation < peer.incarnation
        if overrules(envelope.incarnation, state, peer.incarnation, peer.state):
            self._set(peer, state, envelope.incarnation, addresses, now)

    def _hear_about(self, update: Update, now: float) -> Update | None:
        """What others say of a peer; gives back what to tell whoever holds a peer for gone that has refuted that."""
        peer = self._peers.get(update.node)
        if peer is None:
            return None
        if overrules(update.incarnation, update.state, peer.incarnation, peer.state):
            unprepared = peer.incarnation != UNHEARD and (
                peer.state in (MemberState.ALIVE, MemberState.DRAINING)
                or (peer.suspicion is not None and peer.suspicion.private)
            )
            if update.state is MemberState.SUSPECT:
                self._suspect(peer, update.accuser, max(0, update.incarnation), now)
            elif update.state is MemberState.DEAD and unprepared:
                # Told across a partition that heals, most of all: see for oneself first, at once, and say nothing (memberlist's merge
                # suspects then, too).
                if peer.suspicion is None:
                    self._suspect(peer, update.accuser, max(0, update.incarnation), now, private=True)
            else:
                addresses = update.addresses if update.state in OWN else peer.told
                self._set(peer, update.state, update.incarnation, addresses, now)
        elif (
            peer.suspicion is not None
            and (update.state, update.incarnation) == (MemberState.SUSPECT, peer.incarnation)
            and update.accuser is not None
        ):
            self._confirm(peer, peer.suspicion, update.accuser, now)
        elif update.state not in LIVE and update.incarnation < peer.incarnation:
            return self._update(peer)
        return None

    def _hear_about_me(self, update: Update, teller: NodeId, is_answered: bool) -> None:
        """Refute what is not so: an accusation, or a claim of an earlier life of this node."""
        if update.incarnation < self.incarnation or self.state is MemberState.LEFT:
            return
        if (update.incarnation, update.state) == (self.incarnation, self.state):
            return
        if update.incarnation == self.incarnation > 0 and update.state is not MemberState.LEFT:
            self.prober.doubt(1)  # Lifeguard: whom others suspect may itself be slow
        self._announce(update.incarnation + 1)
        hearers = {update.accuser, None if is_answered else teller} - {None, self.node}
        for node in sorted(hearer for hearer in hearers if hearer is not None and hearer in self._peers):
            self.tell(node, News())

    def _compare_gone(self, their_hash: int, peer: _Peer, now: float) -> None:
        """Tell a peer that holds others for gone than this node does, whom this node holds so. It answers with what is newer."""
        if their_hash == self.gone_hash or now < self._compare_at or peer.state not in LIVE:
            return
        self._compare_at = now + self._settings.compare
        gone = [self._update(self._peers[node]) for node in self._gone]
        for start in range(0, len(gone), MOST_UPDATES // 2):
            more = tuple(gone[start : start + MOST_UPDATES // 2])
            self.outbox.append(Tell(peer.node, peer.addresses, News(), more=more))

    def _correct(self, peer: _Peer, now: float) -> None:
        """Tell a peer that is not held for alive, so that it can refute; not more often than it is probed."""
        said_so_itself = peer.state in OWN and not peer.behind
        if not said_so_itself and now - peer.corrected >= self._settings.probing.direct:
            peer.corrected = now
            self.tell(peer.node, News())

    # --- states -------------------------------------------------------------------------------------------------------

    def _set(self, peer: _Peer, state: MemberState, incarnation: int, addresses: tuple[str, ...], now: float) -> None:
        """A claim was accepted. It is passed on where it changes what can be seen."""
        before, moved = peer.state, addresses != peer.told
        was_heard_of = peer.incarnation != UNHEARD
        self.version += 1
        self._end_suspicion(peer)
        peer.incarnation, peer.told, peer.behind = incarnation, addresses, False
        if state != before:
            peer.state, peer.since = state, now
            if state in LIVE:
                self._live.add(peer.node)
            else:
                self._live.remove(peer.node)
            self._set_gone(peer.node, state not in LIVE)
            self.outbox.append(MemberChanged(peer.node, before, state))
        if state != before or (moved and (was_heard_of or addresses != peer.recorded)):
            self._rumours.add(self._update(peer))

    def _set_gone(self, node: NodeId, gone: bool) -> None:
        if (node in self._gone) != gone:
            self.gone_hash ^= _hash_of(node)
            if gone:
                self._gone[node] = None
            else:
                del self._gone[node]

    def _suspect(
        self, peer: _Peer, accuser: NodeId | None, incarnation: int, now: float, private: bool = False
    ) -> None:
        self._set(peer, MemberState.SUSPECT, incarnation, peer.told, now)
        timer = self._timers.at(now, lambda at: self._expire(peer, at))
        peer.suspicion = _Suspicion(now, set() if accuser is None else {accuser}, timer, private=private)
        if private:
            self._rumours.forget(peer.node)
        else:
            timer.due = now + self._length(peer.suspicion)
            self._rumours.add(self._update(peer))

    def _confirm(self, peer: _Peer, suspicion: _Suspicion, accuser: NodeId, now: float) -> None:
        if accuser in suspicion.accusers or len(suspicion.accusers) > self._settings.confirmations:
            return
        suspicion.accusers.add(accuser)
        self._rumours.add(replace(self._update(peer), accuser=accuser))
        self._rearm(peer, suspicion, now)

    def _rearm(self, peer: _Peer, suspicion: _Suspicion, now: float) -> None:
        """Its end may have come nearer, which a timer that only moves away cannot follow."""
        suspicion.timer.cancelled = True
        due = max(now, suspicion.started + self._length(suspicion))
        suspicion.timer = self._timers.at(due, lambda at: self._expire(peer, at))

    def _length(self, suspicion: _Suspicion) -> float:
        settings = self._settings
        others = len(self._live) - 1
        wanted = settings.confirmations if others >= settings.confirmations else 0
        seconds = suspicion_seconds(
            len(suspicion.accusers) - 1 if suspicion.accusers else 0,
            wanted,
            settings.shortest_suspicion,
            settings.longest_suspicion,
        )
        seconds *= 1 if suspicion.mine else settings.hearsay
        return seconds * settings.isolation if self.isolated else seconds

    def _end_suspicion(self, peer: _Peer) -> None:
        if peer.suspicion is not None:
            peer.suspicion.timer.cancelled = True
            if peer.suspicion.check is not None:
                peer.suspicion.check.cancelled = True
            peer.suspicion = None

    def _expire(self, peer: _Peer, now: float) -> None:
        suspicion = peer.suspicion
        if suspicion is None:
            return
        if self._heard_anybody < suspicion.started and len(self._live) >= 2:
            self.isolated = True
        due = suspicion.started + self._length(suspicion)
        if now < due and not (suspicion.private and not suspicion.mine):
            suspicion.timer = self._timers.at(due, lambda at: self._expire(peer, at))
            return
        if not suspicion.mine:
            suspicion.timer = self._timers.at(now + self._settings.probing.patience, lambda at: self._expire(peer, at))
            if self.state is not MemberState.LEFT:
                self.prober.probe(peer.node, now)
            return
        # Whoever was cut off for so long has probed many, and heard nobody: it is alone now, whoever the others are.
        vanished = [self._peers[node] for node in self.live()] if self.isolated else [peer]
        for each in vanished:
            self._set(each, MemberState.DEAD, max(0, each.incarnation), each.told, now)
            self._rumours.add(replace(self._update(each), accuser=self.node))
        self.isolated = False

    # --- what probing asks for ----------------------------------------------------------------------------------------

    def tell(self, to: NodeId, body: Body, about: NodeId | None = None) -> None:
        """Say something to a node."""
        self.outbox.append(Tell(to, self.addresses_of(to), body, about))

    def answered(self, node: NodeId, now: float) -> None:
        """A peer answered, this node or one that helped."""
        if (peer := self._peers.get(node)) is not None:
            self._sign_of_life(peer, now)

    def failed(self, node: NodeId, started: float, now: float) -> None:
        """A peer answered nobody since `started`."""
        peer = self._peers.get(node)
        if peer is None or peer.state not in LIVE or self.state is MemberState.LEFT:
            return
        if self._heard_anybody < started and len(self._live) >= 2:
            self._silent.add(node)
            self.isolated = self.isolated or len(self._silent) >= 2
        if peer.suspicion is None:
            self._suspect(peer, self.node, max(0, peer.incarnation), now)
        else:
            self._confirm(peer, peer.suspicion, self.node, now)
        suspicion = peer.suspicion
        if suspicion is not None and not suspicion.mine:
            # What was only heard before may have been refuted meanwhile, unheard: the time to refute begins now.
            suspicion.mine, suspicion.private, suspicion.started = True, False, now
            self._rumours.add(replace(self._update(peer), accuser=self.node))
            self._rearm(peer, suspicion, now)
            suspicion.check = self._timers.at(now, lambda at: self._check(peer, suspicion, at))

    def _check(self, peer: _Peer, suspicion: _Suspicion, now: float) -> None:
        """Ask a suspect again and again, telling it that it is one."""
        if peer.suspicion is suspicion:
            self.tell(peer.node, Ping(self.prober.number()))
            again = now + self._settings.probing.interval
            suspicion.check = self._timers.at(again, lambda at: self._check(peer, suspicion, at))

    # --- the dead and the seeds ---------------------------------------------------------------------------------------

    def _retry(self, now: float) -> None:
        if self.state is MemberState.LEFT:
            return
        self._timers.at(now + self._settings.retry, self._retry)
        gone = len(self._gone)
        if gone and self._dice.random() * (len(self._live) + 1) < self._settings.retries_for_each * gone:
            self.tell(list(self._gone)[self._dice.randrange(gone)], Ping(self.prober.number()))
        for address, node in self._seeds.items():
            if node is None or (node != self.node and node not in self._live):
                self._seeds[address] = self._seeds.pop(address)  # the next time another one's turn comes first
                self._ask_seed(address)
                break

    def _ask_seed(self, address: str) -> None:
        number = self.prober.number()
        if len(self._asked_seeds) > 2 * MOST_SEEDS:
            del self._asked_seeds[next(iter(self._asked_seeds))]
        self._asked_seeds[number] = address
        self.outbox.append(Tell(None, (address,), Ping(number)))

    def _found(self, address: str, node: NodeId) -> None:
        if address in self._seeds:
            self._seeds[address] = node
        if (peer := self._peers.get(node)) is not None and address not in peer.addresses:
            peer.found = (address, *peer.found)[:4]
            self.version += 1
