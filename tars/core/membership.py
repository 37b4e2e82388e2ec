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
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b

from tars.core.member_rumours import MemberRumours
from tars.core.membership_settings import MembershipSettings
from tars.core.mesh_events import MemberChanged, MemberView
from tars.core.mesh_messages import Ack, Body, Envelope, MemberState, Nack, News, Ping, PingRequest, Update
from tars.core.peer import LIVE, OWN, UNHEARD, Peer, Suspicion
from tars.core.probe_order import Dice, ProbeOrder
from tars.core.probing import Prober
from tars.core.seeds_asked import SeedsAsked
from tars.core.suspicion import overrules, suspicion_seconds
from tars.core.timers import Timers
from tars.core.types import NodeId

__all__ = ["Membership", "MembershipSettings", "Tell"]

MOST_UPDATES = 256
"""In one envelope."""
MOST_INCARNATION = 2**48
"""A node that refutes once a second gets there in nine million years; more than that is damage, and would not fit into JSON for long."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Say `body` to `to`, or to whoever is at `addresses`. `about`: with the state of that node. `more` goes along too."""

    to: NodeId | None
    addresses: tuple[str, ...]
    body: Body
    about: NodeId | None = None
    more: tuple[Update, ...] = ()


@lru_cache(maxsize=4096)
def _hash_of(node: NodeId) -> int:
    return int.from_bytes(blake2b(node.encode("utf-8", "surrogatepass"), digest_size=8).digest())


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
        self._own: Update | None = None
        """What it says of itself, until its incarnation changes."""
        self._peers: dict[NodeId, Peer] = {}
        self._live = ProbeOrder(node, dice)
        self._gone: dict[NodeId, None] = {}
        self.gone_hash = 0
        """Over the peers that are held for dead or gone; equal on all nodes that agree."""
        self._compare_at = float("-inf")
        self._rumours = MemberRumours()
        self._seeds = SeedsAsked()
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
            updates.append(to.update())
            to.behind = False
        if tell.about is not None and (about := self._peers.get(tell.about)) is not None:
            updates.append(about.update())
        room = max(0, min(self._settings.updates, MOST_UPDATES - len(updates)))
        named = {update.node for update in updates if update.node != self.node}
        news = self._rumours.take(room, len(self._live), named | {tell.to})
        return (*updates, *(update for update in news if update.node != self.node))

    def _own_update(self) -> Update:
        own = self._own
        if own is None or (own.incarnation, own.state) != (self.incarnation, self.state):
            own = self._own = Update(self.node, self.incarnation, self.state, self._addresses)
        return own

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
        self._peers[node] = Peer(node, MemberState.ALIVE, UNHEARD, now, addresses)
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
        if address not in self._addresses and self._seeds.add(address):
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
        return isinstance(envelope.body, Ack) and self._seeds.was_asked(envelope.body.number)

    def received(self, envelope: Envelope, now: float) -> None:
        """An envelope from a member, or from this node itself (a seed was its own address)."""
        sender, body = envelope.sender, envelope.body
        if isinstance(body, Ack) and (address := self._seeds.answered(body.number, sender)) is not None:
            self._found(address, sender)
        if sender == self.node:
            if isinstance(body, Ping):
                self.tell(sender, Ack(body.number))
            return
        peer = self._peers.get(sender)
        if peer is None or not 0 <= envelope.incarnation <= MOST_INCARNATION:
            return
        self._sign_of_life(peer, now)
        self._hear_itself(peer, envelope, now)
        newer = []
        for update in envelope.updates:
            if not 0 <= update.incarnation <= MOST_INCARNATION:
                continue
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
            self._seeds.unanswered(number)
            self.prober.not_sent(to, number, now)

    def traffic(self, node: NodeId, now: float) -> None:
        """Something else came from a peer."""
        if (peer := self._peers.get(node)) is not None:
            self._sign_of_life(peer, now)
            self._correct(peer, now)

    def _sign_of_life(self, peer: Peer, now: float) -> None:
        peer.heard = self._heard_anybody = now
        self._silent.clear()
        if self.isolated:
            self.isolated = False
            for other in self._peers.values():  # their time to refute begins now that they can be heard
                self._restart(other, now)
        self._restart(peer, now)

    @staticmethod
    def _restart(peer: Peer, now: float) -> None:
        if peer.suspicion is not None:
            peer.suspicion.started = now

    def _hear_itself(self, peer: Peer, envelope: Envelope, now: float) -> None:
        """What a peer says of itself, at first hand."""
        for update in envelope.updates:
            if update.node == peer.node and update.incarnation == envelope.incarnation and update.state in OWN:
                state, addresses = update.state, update.addresses
                break
        else:
            state, addresses = MemberState.ALIVE, peer.told
        # After a restart it counts from nothing: it may say another thing with the very number that it had.
        peer.behind = envelope.incarnation < peer.incarnation or (
            envelope.incarnation == peer.incarnation and state is not peer.state
        )
        if overrules(envelope.incarnation, state, peer.incarnation, peer.state):
            self._set(peer, state, envelope.incarnation, addresses, now)

    def _hear_about(self, update: Update, now: float) -> Update | None:
        """What others say of a peer; gives back what to tell whoever holds a peer for gone that has refuted that."""
        peer = self._peers.get(update.node)
        if peer is None:
            return None
        if overrules(update.incarnation, update.state, peer.incarnation, peer.state):
            # Nobody dies sooner after a sign of life than a suspicion lasts.
            unlikely = now - peer.heard < self._settings.shortest_suspicion
            unprepared = unlikely or (
                peer.incarnation != UNHEARD
                and (
                    peer.state in (MemberState.ALIVE, MemberState.DRAINING)
                    or (peer.suspicion is not None and peer.suspicion.private)
                )
            )
            if update.state is MemberState.SUSPECT:
                self._suspect(peer, update.accuser, max(0, update.incarnation), now)
            elif update.state is MemberState.DEAD and unprepared:
                # Told across a partition that heals, most of all, or by who was removed and is refused by all: see for oneself first, at
                # once, and say nothing (memberlist's merge suspects then, too).
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
            return peer.update()
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

    def _compare_gone(self, their_hash: int, peer: Peer, now: float) -> None:
        """Tell a peer that holds others for gone than this node does, whom this node holds so. It answers with what is newer."""
        if their_hash == self.gone_hash or now < self._compare_at or peer.state not in LIVE:
            return
        self._compare_at = now + self._settings.compare
        gone = [self._peers[node].update() for node in self._gone]
        for start in range(0, len(gone), MOST_UPDATES // 2):
            more = tuple(gone[start : start + MOST_UPDATES // 2])
            self.outbox.append(Tell(peer.node, peer.addresses, News(), more=more))

    def _correct(self, peer: Peer, now: float) -> None:
        """Tell a peer that is not held for alive, so that it can refute; not more often than it is probed."""
        said_so_itself = peer.state in OWN and not peer.behind
        if not said_so_itself and now - peer.corrected >= self._settings.probing.direct:
            peer.corrected = now
            self.tell(peer.node, News())

    # --- states -------------------------------------------------------------------------------------------------------

    def _set(self, peer: Peer, state: MemberState, incarnation: int, addresses: tuple[str, ...], now: float) -> None:
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
            self._rumours.add(peer.update())

    def _set_gone(self, node: NodeId, gone: bool) -> None:
        if (node in self._gone) != gone:
            self.gone_hash ^= _hash_of(node)
            if gone:
                self._gone[node] = None
            else:
                del self._gone[node]

    def _suspect(self, peer: Peer, accuser: NodeId | None, incarnation: int, now: float, private: bool = False) -> None:
        self._set(peer, MemberState.SUSPECT, incarnation, peer.told, now)
        timer = self._timers.at(now, lambda at: self._expire(peer, at))
        peer.suspicion = Suspicion(now, set() if accuser is None else {accuser}, timer, private=private)
        if private:
            self._rumours.forget(peer.node)
        else:
            timer.due = now + self._length(peer.suspicion)
            self._rumours.add(peer.update())

    def _confirm(self, peer: Peer, suspicion: Suspicion, accuser: NodeId, now: float) -> None:
        if accuser in suspicion.accusers or len(suspicion.accusers) > self._settings.confirmations:
            return
        suspicion.accusers.add(accuser)
        self._rumours.add(replace(peer.update(), accuser=accuser))
        self._rearm(peer, suspicion, now)

    def _rearm(self, peer: Peer, suspicion: Suspicion, now: float) -> None:
        """Its end may have come nearer, which a timer that only moves away cannot follow."""
        suspicion.timer.cancelled = True
        due = max(now, suspicion.started + self._length(suspicion))
        suspicion.timer = self._timers.at(due, lambda at: self._expire(peer, at))

    def _length(self, suspicion: Suspicion) -> float:
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

    def _end_suspicion(self, peer: Peer) -> None:
        if peer.suspicion is not None:
            peer.suspicion.timer.cancelled = True
            if peer.suspicion.check is not None:
                peer.suspicion.check.cancelled = True
            peer.suspicion = None

    def _expire(self, peer: Peer, now: float) -> None:
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
            self._rumours.add(replace(each.update(), accuser=self.node))
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
            self._rumours.add(replace(peer.update(), accuser=self.node))
            self._rearm(peer, suspicion, now)
            suspicion.check = self._timers.at(now, lambda at: self._check(peer, suspicion, at))

    def _check(self, peer: Peer, suspicion: Suspicion, now: float) -> None:
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
        if (address := self._seeds.next(lambda node: node == self.node or node in self._live)) is not None:
            self._ask_seed(address)

    def _ask_seed(self, address: str) -> None:
        number = self.prober.number()
        self._seeds.asked(number, address)
        self.outbox.append(Tell(None, (address,), Ping(number)))

    def _found(self, address: str, node: NodeId) -> None:
        if (peer := self._peers.get(node)) is not None and address not in peer.addresses:
            peer.found = (address, *peer.found)[:4]
            self.version += 1
