"""What a node learns of replicas while it sends them calls: how much each was given, how fast it is, what failed there a moment ago.

Law of this file: pure; time comes as an argument, on one monotonic clock. `choose` ranks and reserves in one step, so that of a hundred
calls that come together the second one already sees the first: nobody herds onto the replica that was free a moment before.

Everything here is this node's own view and is bounded; it is never sent to others. What is old is forgotten: an answer of five minutes ago
says little about a PC on which somebody plays by now.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tars.core.health import Breaker, BreakerState, Uniform
from tars.core.prefix_affinity import Block, PrefixAffinity
from tars.core.routing import UNITS_PER_CALL, USUAL, Candidate, Demand, Ranked, first_seconds, rank
from tars.core.types import NodeId, ReplicaId, ReplicaState

MEAN_WEIGHT = 0.2
"""Weight of the newest call in the moving means: about the last ten calls count (EWMA, as in TCP's RTT)."""
MEASURED_SECONDS = 300.0
"""What was measured longer ago is forgotten and the replica's own word counts again: one that was slow once is tried again."""
TOLD_HALF_LIFE_SECONDS = 5.0
"""A peer's word on its queue loses half its weight in this time: about what a call takes, and how often ten nodes hear of each other."""
WARM_SECONDS = 60.0
"""Used so lately, clocks and caches are still up."""
MOST_BOOKS = 4096
"""Replicas and nodes kept in mind; idle ones that were used the longest ago go first."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one answered call showed. `units` in `seconds`: tokens after the first one, or texts."""

    units: float
    seconds: float
    asked: float | None = None
    """What the whole call asked for, in units; None: `units`."""
    waited: bool = True
    """Whether `seconds` hold the time in the replica's queue, too."""
    prefill_tokens: float = 0.0
    prefill_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Reservation:
    """A call's place at a replica: made by `choose`, ended by `release`, once."""

    replica: ReplicaId
    node: NodeId
    units: float
    ahead: float
    calls_ahead: float
    slots: int
    local: bool = True
    predicted: float = 0.0
    """Seconds until the call is done there, as it was ranked."""
    predicted_first: float = 0.0
    """Seconds until its first token, likewise: queue, prefill and the way there."""
    open: bool = True
    probe: bool = False
    """It finds out whether a replica (or node) whose breaker is half-open works again."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`reservation` is None where nobody (or nobody new) can take the call; `ranked` says why."""

    reservation: Reservation | None
    ranked: Ranked


@dataclass(slots=True)
class _Book:
    """One replica's."""

    units: float = 0.0
    calls: int = 0
    usual_units: float | None = None
    rate_units: float = 0.0
    rate_seconds: float = 0.0
    prefill_tokens: float = 0.0
    prefill_seconds: float = 0.0
    measured_at: float = float("-inf")
    used_at: float = float("-inf")
    told_calls: float = 0.0
    """Calls of others, when it was last told."""
    told_at: float = float("-inf")


class ReplicaLedger:
    """See the module's law. `rng` spreads the breakers' cooldowns; without it they are exact."""

    def __init__(self, rng: Uniform | None = None) -> None:
        self._rng = rng
        self._books: OrderedDict[ReplicaId, _Book] = OrderedDict()
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()
        """Of replicas and nodes that failed and have not answered since."""
        self._prefixes = PrefixAffinity()

    # --- choosing ----------------------------------------------------------------------------------------------------

    def choose(
        self,
        candidates: Sequence[Candidate],
        call_key: str,
        now: float,
        demand: Demand = USUAL,
        blocks: Sequence[Block] = (),
        without: Collection[ReplicaId] = (),
    ) -> Choice:
        """The best candidate not in `without` (those that the call has tried), reserved.

        `blocks`: the prompt's, as `prefix_affinity.blocks_of` makes them.
        """
        known = {
            each.replica: self.annotated(each, now, blocks) if each.state is ReplicaState.READY else each
            for each in candidates
            if each.replica not in without
        }
        ranked = rank(list(known.values()), call_key, demand)
        if not ranked.order:
            return Choice(None, ranked)
        chosen = ranked.order[0]
        candidate, book = known[chosen], self._book(chosen)
        assert candidate.ahead is not None
        calls_ahead = max(book.calls, candidate.active + candidate.queued)
        reservation = Reservation(
            chosen,
            candidate.node,
            ranked.units,
            candidate.ahead,
            calls_ahead,
            max(1, candidate.slots),
            candidate.local,
            predicted=ranked.seconds[chosen],
            predicted_first=first_seconds(candidate, demand.prompt_tokens, ranked.otherwise),
        )
        for breaker in self._breakers_of(reservation):
            if breaker.state(now) is BreakerState.HALF_OPEN and breaker.may_try(now):
                breaker.tried(now)
                reservation.probe = True
        book.units += ranked.units
        book.calls += 1
        self._prefixes.computed(chosen, blocks, candidate.cache_tokens)
        return Choice(reservation, ranked)

    def annotated(self, candidate: Candidate, now: float, blocks: Sequence[Block] = ()) -> Candidate:
        """The candidate with what was learned of it."""
        book = self._books.get(candidate.replica)
        breaker, cooldown = self._health(candidate, now) if self._breakers else (BreakerState.CLOSED, 0.0)
        if book is None:
            usual, others, own = None, float(candidate.active + candidate.queued), 0.0
        else:
            usual, own = book.usual_units, book.units
            # Its node's word, where that is as fresh as this very moment (a replica here); else what a peer told, as old as it is.
            said = candidate.active + candidate.queued - book.calls
            age = now - book.told_at
            others = max(0.0, said, book.told_calls * 0.5 ** (age / TOLD_HALF_LIFE_SECONDS))
        recent = book is not None and now - book.measured_at <= MEASURED_SECONDS
        # Spelled out: every call does this for every replica of its model, and with `dataclasses.replace` a choice took twice as long.
        return Candidate(
            candidate.replica,
            candidate.model,
            candidate.kind,
            candidate.state,
            candidate.node,
            candidate.local,
            candidate.standing,
            candidate.active,
            candidate.queued,
            candidate.slots,
            candidate.speed,
            candidate.prefill_speed,
            candidate.cache_tokens,
            candidate.file_sha256,
            candidate.exact,
            ahead=own + others * (usual or UNITS_PER_CALL),
            measured=_ratio(book.rate_units, book.rate_seconds) if recent and book else None,
            measured_prefill=_ratio(book.prefill_tokens, book.prefill_seconds) if recent and book else None,
            usual_units=usual,
            cold=others < 0.5 and not own and (book is None or now - book.used_at > WARM_SECONDS),
            breaker=breaker,
            cooldown=cooldown,
            shared_tokens=self._prefixes.shared_tokens(candidate.replica, blocks) if blocks else 0.0,
        )

    # --- learning ----------------------------------------------------------------------------------------------------

    def release(self, reservation: Reservation, now: float) -> None:
        """The call ended there, however it did. A second time is ignored."""
        if not reservation.open:
            return
        reservation.open = False
        if reservation.probe:
            # Where it answered or failed, that was said before and the breakers know.
            for breaker in self._breakers_of(reservation):
                breaker.gave_up()
        book = self._book(reservation.replica)
        book.calls = max(0, book.calls - 1)
        # Sums of floats drift: with nothing in flight it is nothing.
        book.units = max(0.0, book.units - reservation.units) if book.calls else 0.0
        book.used_at = now

    def learn(self, reservation: Reservation, seen: Observation, now: float, hop_seconds: float = 0.0) -> None:
        """A call was answered: the replica is in good standing, and as fast as this. `hop_seconds`: of the way, no part of its speed."""
        self.began(reservation)
        book = self._book(reservation.replica)
        asked = seen.units if seen.asked is None else seen.asked
        if asked > 0:
            book.usual_units = _mean(book.usual_units, asked)
        if seen.units > 0 and seen.seconds > 0:
            # What one call alone would have taken: the same sharing that `predicted_seconds` reckons with, taken off again.
            if seen.waited:
                sharing = 1 + reservation.ahead / (reservation.slots * max(reservation.units, 1e-9))
            else:
                sharing = 1 + min(reservation.calls_ahead, reservation.slots - 1) / reservation.slots
            seconds = max(seen.seconds - hop_seconds, seen.seconds * 0.1) / sharing
            fresh = now - book.measured_at > MEASURED_SECONDS
            # Units and seconds apart: a mean of speeds would give a call of one text, which is all way and no work, as much say as a
            # call of a thousand.
            book.rate_units = _mean(None if fresh else book.rate_units, seen.units)
            book.rate_seconds = _mean(None if fresh else book.rate_seconds, seconds)
            if fresh:
                book.prefill_tokens = book.prefill_seconds = 0.0
            book.measured_at = now
        if seen.prefill_tokens > 0 and seen.prefill_seconds > 0:
            book.prefill_tokens = _mean(book.prefill_tokens or None, seen.prefill_tokens)
            book.prefill_seconds = _mean(book.prefill_seconds or None, seen.prefill_seconds)

    def began(self, reservation: Reservation) -> None:
        """The first piece of an answer came: the replica and its node work. A long stream keeps nobody away until it ends."""
        self.works(reservation.replica)
        self.works(reservation.node)

    def failed(self, who: ReplicaId | NodeId, seconds: float, now: float, *, late: bool = False) -> None:
        """Its breaker opens: ask others first for `seconds`, longer for each failure in a row; see `health.Breaker.failed`."""
        breaker = self._breakers.get(who)
        if breaker is None:
            breaker = self._breakers[who] = Breaker(self._rng)
        breaker.failed(seconds, now, late=late)
        self._breakers.move_to_end(who)
        while len(self._breakers) > MOST_BOOKS:
            self._breakers.popitem(last=False)

    def heard(self, replica: ReplicaId) -> None:
        """A further piece of an answer came: who was only late is not any more. One that is full or broken for others stays so."""
        if self._breakers and (breaker := self._breakers.get(replica)) is not None and breaker.by_lateness:
            del self._breakers[replica]

    def works(self, who: ReplicaId | NodeId) -> None:
        """Its breaker closes: it answered, or it was heard of again."""
        self._breakers.pop(who, None)

    def breaker(self, who: ReplicaId | NodeId, now: float) -> BreakerState:
        """How a replica's, or a node's own breaker stands."""
        breaker = self._breakers.get(who)
        return BreakerState.CLOSED if breaker is None else breaker.state(now)

    def told(self, loads: Iterable[tuple[str, int, int]], now: float) -> None:
        """A peer's word on its replicas: (replica, active calls, queued calls). Those that this node sent are among them."""
        for replica, active, queued in loads:
            book = self._book(ReplicaId(replica))
            book.told_calls = float(max(0, active + queued - book.calls))
            book.told_at = now
            if active + queued:
                book.used_at = now

    def cache_lost(self, replica: ReplicaId) -> None:
        """Its worker started anew, or it was unloaded: no prefix is there any more."""
        self._prefixes.forget(replica)

    def in_flight(self, replica: ReplicaId) -> int:
        """Calls that hold a reservation there."""
        book = self._books.get(replica)
        return 0 if book is None else book.calls

    # --- inside ------------------------------------------------------------------------------------------------------

    def _book(self, replica: ReplicaId) -> _Book:
        book = self._books.get(replica)
        if book is None:
            book = self._books[replica] = _Book()
            if len(self._books) > MOST_BOOKS:
                idle = next((each for each, kept in self._books.items() if not kept.calls and each != replica), None)
                if idle is not None:
                    del self._books[idle]
        self._books.move_to_end(replica)
        return book

    def _breakers_of(self, place: Reservation | Candidate) -> list[Breaker]:
        if not self._breakers:
            return []
        found = (self._breakers.get(place.replica), self._breakers.get(place.node))
        return [each for each in found if each is not None]

    def _health(self, candidate: Candidate, now: float) -> tuple[BreakerState, float]:
        """The worse of the replica's breaker and its node's; seconds until both may be tried. One that is being tried counts as open."""
        found = self._breakers_of(candidate)
        if all(each.may_try(now) for each in found):
            return (BreakerState.HALF_OPEN if found else BreakerState.CLOSED), 0.0
        return BreakerState.OPEN, max(each.cooldown(now) for each in found)


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + MEAN_WEIGHT * (newest - before)


def _ratio(units: float, seconds: float) -> float | None:
    return units / seconds if units > 0 and seconds > 0 else None
