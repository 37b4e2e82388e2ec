"""One call from its first to its last byte: what is tried where, given up as late, continued elsewhere, asked twice, waited for.

Law of this file: pure. Each input takes the time and gives back the effects that it wants done, in order; the same machine runs under
the node's asyncio router and in the simulation. There is one for each call; what calls share is in `RoutingState`. After `Answer` or `Fail`
the call is over and every input is ignored, as is whatever comes from an attempt that ended.

    begin ──> running <──────────────── tick, fleet_changed
                │  │  late, and another one is free: Stop, Start          waiting ──> running
                │  └─ slow, and the hedge budget allows it: Start beside   (all were tried: backoff;
                ├─ finished: Stop the others, Answer                        nobody has a replica: AskToLoad)
                └─ failed:   Start the next one, wait, or Fail

A call that gave tokens goes on only where the same file is loaded, and is not shed any more: what it took so far would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from tars.core.call_effects import (
    ANSWERED,
    CANCELLED,
    DEADLINE,
    LATE,
    LOST_RACE,
    NO_REPLICA,
    Answer,
    AskToLoad,
    AttemptRecord,
    CallShape,
    Effect,
    Fail,
    Failure,
    Start,
    Stop,
    Wake,
)
from tars.core.call_progress import CallProgress
from tars.core.health import BreakerState, Uniform
from tars.core.hedging import full_jitter
from tars.core.replica_ledger import Choice, Observation, Reservation
from tars.core.retry_rules import Blame, lesson_of, may_go_on, needs_budget
from tars.core.routing import HOP_SECONDS, Candidate, may_take
from tars.core.routing_state import RoutingState
from tars.core.types import ReplicaId, ReplicaState

COMING = frozenset({ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING})
"""States of a replica that may be ready soon."""
HOPE_SECONDS = 10.0
"""So long a call waits for one of them, where those that are ready would begin it too late. A small model is loaded by then."""
LOOK_SECONDS = 1.0
"""A call that waits for a replica, or stays with a late one because there is no other, looks again so often, told or not."""
LEARNED_AFTER = frozenset({0, 4, 16, 64, 256})
"""Pieces after the first one, at which the bound on the next is taken from what was learned: a replica that nobody had measured is given
much time for its second token, and shows meanwhile how long it needs."""
NOTHING: tuple[Effect, ...] = ()

Effects = Sequence[Effect]


@dataclass(slots=True, eq=False)
class _Attempt:
    """One that runs."""

    number: int
    reservation: Reservation
    record: AttemptRecord
    candidate: Candidate
    since: float
    """Since when it is waited for: its start, then its last event."""
    patience: float
    """Seconds after `since` at which it is late."""
    look_at: float = 0.0
    """It is late, there was nobody else, and this is when that is looked at again."""
    began: bool = False
    gaps: int = 0
    """Pieces after the first."""

    @property
    def due(self) -> float:
        return max(self.since + self.patience, self.look_at)


class CallMachine:
    """See the module's law. `candidates` gives the model's replicas as they are now, in whatever state; `rng` jitters waits."""

    def __init__(
        self, shape: CallShape, state: RoutingState, candidates: Callable[[], Sequence[Candidate]], rng: Uniform
    ):
        self.attempts: list[AttemptRecord] = []
        """Every attempt so far, the first one first; `Start.attempt` is the index here."""
        self.over = False
        self.continuations = 0
        """Attempts that went on from tokens of an earlier one."""
        self._shape = shape
        self._state = state
        self._candidates = candidates
        self._rng = rng
        self._running: dict[int, _Attempt] = {}
        self._progress = CallProgress(shape.answers, shape.exact, shape.file_sha256)
        self._saved: tuple[Candidate, object] | None = None
        """The state that a replica saved of it."""
        self._last: Failure | None = None
        self._again_at = inf
        """Nobody runs, and this is when it is tried again."""
        self._hopes_until = inf
        """Until then it waits for a replica that loads, rather than fail."""
        self._asked_to_load = False
        self._hedge_at = inf
        self._wake_at = inf
        self._caller_reads = False

    # --- inputs ------------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> Effects:
        """The call came. Once."""
        if not self._shape.forwarded:
            self._state.retries.call()
        return self._next("first choice", now)

    def tokens(self, attempt: int, index: int, ids: Sequence[int], now: float) -> Effects:
        """A piece of answer `index` came with these tokens (none, where text was held back)."""
        running = self._running.get(attempt)
        if running is None:
            return NOTHING
        if ids:
            self._progress.gave(running.candidate, index, ids)
            running.record.tokens += len(ids)
        replica = running.reservation.replica
        if running.began:
            self._state.deadlines.saw_gap(replica, now - running.since, now)
            self._state.ledger.heard(replica)
            running.gaps += 1
        else:
            self._begins(running, now)
        running.since = now
        if self._shape.forwarded or running.gaps not in LEARNED_AFTER:
            return NOTHING
        running.patience = self._state.deadlines.gap(replica, now)
        return self._armed([], now)

    def caller_reads(self) -> None:
        """The caller has been given something and nobody listens to the replica meanwhile: it cannot be late."""
        self._caller_reads = True

    def caller_waits(self, now: float) -> None:
        """The replica is listened to again."""
        self._caller_reads = False
        for running in self._running.values():
            running.since = now

    def finished(self, attempt: int, seen: Observation | None, now: float) -> Effects:
        """Its finished event came. `seen`: what the answer showed of the replica."""
        running = self._running.get(attempt)
        if running is None:
            return NOTHING
        if not running.began:
            self._begins(running, now)
        reservation = running.reservation
        if seen is not None:
            # What the replica measured itself has no way in it.
            hop = 0.0 if reservation.local or not seen.waited else HOP_SECONDS
            self._state.ledger.learn(reservation, seen, now, hop)
        if not self._shape.streams and not self._shape.forwarded:
            self._state.deadlines.saw_answer(self._shape.model, reservation.units, now - running.record.started, now)
            self._state.hedges.answered(reservation.units)
        self._end(running, ANSWERED, now)
        effects = self._stop_all(LOST_RACE, now)
        effects.append(Answer(attempt))
        self.over = True
        return effects

    def failed(self, attempt: int, failure: Failure, now: float) -> Effects:
        """It ended without an answer."""
        running = self._running.get(attempt)
        if running is None:
            return NOTHING
        self._end(running, failure.kind, now)
        self._gave_up(running, failure, now)
        if not may_go_on(failure):
            return self._fail(failure, now)
        if self._running:
            return self._armed([], now)  # the other one is still at it
        if self._progress.kills_what_runs_it or (self._shape.forwarded and (failure.sent or self._progress.begun)):
            return self._fail(failure, now)
        if needs_budget(failure) and not self._may_try_again():
            return self._fail(failure, now)
        self._saved = None if failure.saved is None else (running.candidate, failure.saved)
        return self._next(self._because(), now)

    def refused_to_load(self, failure: Failure, now: float) -> Effects:
        """The answer to `AskToLoad`: no replica will come."""
        return NOTHING if self.over or self._running else self._fail(failure, now)

    def fleet_changed(self, now: float) -> Effects:
        """Candidates changed. Only for a call that waits does that mean something."""
        if self.over or self._running or self._again_at == inf:
            return NOTHING
        choice = self._choose(now)
        return NOTHING if choice.reservation is None else self._start(choice, self._because(), now)

    def tick(self, now: float) -> Effects:
        """The time of the last `Wake` has come."""
        if self.over:
            return NOTHING
        self._wake_at = inf
        if now >= self._shape.deadline:
            return self._fail(DEADLINE, now)
        if not self._running:
            if now < self._again_at:
                return self._armed([], now)
            self._progress.forgive(now)
            return self._next(self._because(), now)
        if all(now >= each.due for each in self._running.values()):
            return self._late(now)
        if now >= self._hedge_at:
            return self._hedge(now)
        return self._armed([], now)

    def cancelled(self, now: float) -> Effects:
        """The caller is gone."""
        if self.over:
            return NOTHING
        self.over = True
        return self._stop_all(CANCELLED, now)

    # --- choosing and starting ---------------------------------------------------------------------------------------

    def _next(self, because: str, now: float) -> Effects:
        """Start the best that was not tried, or wait."""
        if now >= self._shape.deadline:
            return self._fail(DEADLINE, now)
        choice = self._choose(now)
        return self._wait(now) if choice.reservation is None else self._start(choice, because, now)

    def _choose(self, now: float, *also_without: ReplicaId) -> Choice:
        shape, tried = self._shape, self._progress.tried
        without = {*tried, *also_without} if also_without else tried
        candidates = self._candidates()
        able = self._progress.able(candidates)
        choice = self._state.ledger.choose(able, shape.key, now, shape.demand, shape.blocks, without)
        if choice.reservation is None and self._progress.begun and not shape.shown:
            # Two unlike PCs have the same model in different files: a whole answer of the other one is worth more than a wait.
            choice = self._state.ledger.choose(candidates, shape.key, now, shape.demand, shape.blocks, without)
        return choice

    def _start(self, choice: Choice, because: str, now: float, *, hedge: bool = False) -> list[Effect]:
        reservation, shape, deadlines = choice.reservation, self._shape, self._state.deadlines
        assert reservation is not None
        candidate = next(each for each in choice.ranked.candidates if each.replica == reservation.replica)
        if not self._progress.able([candidate]):
            self._progress.begin_anew()
            because = f"begun anew {because}"
        continues = self._progress.begun
        if continues:
            self.continuations += 1
            because = f"continued {because}"
        number = len(self.attempts)
        record = AttemptRecord(
            reservation.replica, reservation.node, now, because, choice.ranked, hedge=hedge, continued=continues
        )
        self.attempts.append(record)
        patience = inf
        if not shape.forwarded:
            patience = deadlines.first_token(reservation.replica, self._predicted(reservation), now)
            if not shape.streams and not hedge:
                usual = deadlines.answer_p95(shape.model, reservation.units, now)
                self._hedge_at = inf if usual is None else now + usual
        self._running[number] = _Attempt(number, reservation, record, candidate, now, patience)
        self._again_at = inf
        self._asked_to_load = False
        saved = self._handed_over(candidate)
        resume = self._progress.tokens if continues or saved is not None else None
        file = (None if resume is None else self._progress.file) or candidate.file_sha256
        return self._armed([Start(number, reservation, resume, saved, file)], now)

    def _predicted(self, reservation: Reservation) -> float:
        """Seconds until its first event, as it was ranked; without a stream that is the answer."""
        return reservation.predicted_first if self._shape.streams else reservation.predicted

    def _handed_over(self, candidate: Candidate) -> object | None:
        """The state that was saved of the call, where this replica can go on from it. It is there once."""
        given, self._saved = self._saved, None
        if given is None:
            return None
        source, saved = given
        return saved if source.file_sha256 and source.file_sha256 == candidate.file_sha256 else None

    def _wait(self, now: float) -> Effects:
        """Nobody untried is ready."""
        if self._shape.forwarded:
            return self._fail(self._last or NO_REPLICA, now)
        progress, remaining = self._progress, self._shape.deadline - now
        able = progress.able(self._candidates()) if self._shape.shown else self._candidates()
        ready = [each.replica for each in able if may_take(each)]
        if ready:
            again, said = progress.again_from(ready, now)
            soonest = again - now
            if soonest >= remaining:
                self._hopes_until = min(self._hopes_until, now + HOPE_SECONDS)
                hopes = remaining > LOOK_SECONDS and now < self._hopes_until
                if hopes and any(each.state in COMING for each in able):
                    # Too late there; one that loads, and is ready before that, is not.
                    self._again_at = now + LOOK_SECONDS
                    return self._armed([], now)
                # Now rather than late, and with the word of who is there: others may have died meanwhile.
                return self._fail(said or self._last or NO_REPLICA, now)
            pause = min(full_jitter(progress.rounds, self._rng), remaining / 2)
            progress.rounds += 1
            self._again_at = now + max(pause, soonest)
            return self._armed([], now)
        # Whoever becomes ready from now on is another process than the one that failed.
        progress.tried.clear()
        self._again_at = now + LOOK_SECONDS
        effects: list[Effect] = []
        if not self._asked_to_load:
            self._asked_to_load = True
            effects.append(AskToLoad())
        return self._armed(effects, now)

    # --- late and slow -----------------------------------------------------------------------------------------------

    def _late(self, now: float) -> Effects:
        """All that run are late: give them up for another one, if there is one in good standing and the budget allows it."""
        choice = None if self._caller_reads else self._better(now)
        if choice is None:
            # The next look takes those too that were given up before: this one may be frozen where they were slow.
            self._progress.forgive(now)
            for running in self._running.values():
                running.look_at = now + LOOK_SECONDS
            return self._armed([], now)
        effects: list[Effect] = []
        deadlines = self._state.deadlines
        for running in list(self._running.values()):
            replica = running.reservation.replica
            (deadlines.gave_up_gap if running.began else deadlines.gave_up_first)(replica)
            self._end(running, LATE, now)
            self._gave_up(running, Failure(LATE, sent=True), now)
            effects.append(Stop(running.number))
        return [*effects, *self._start(choice, self._because(), now)]

    def _hedge(self, now: float) -> Effects:
        """Slower than 95 of 100: ask a second one beside it."""
        self._hedge_at = inf
        choice = self._better(now, hedge=True)
        return self._armed([], now) if choice is None else self._start(choice, "hedge", now, hedge=True)

    def _better(self, now: float, *, hedge: bool = False) -> Choice | None:
        """Another one than those that run, in good standing and paid from the budgets; None where there is none."""
        state = self._state
        choice = self._choose(now, *(each.reservation.replica for each in self._running.values()))
        chosen = choice.reservation
        if chosen is None:
            return None
        troubled = BreakerState.OPEN in (
            state.ledger.breaker(chosen.replica, now),
            state.ledger.breaker(chosen.node, now),
        )
        # Nothing is taken from the one budget where the other one refuses.
        if troubled or (hedge and not state.hedges.may_hedge(chosen.units)) or not self._may_try_again():
            state.ledger.release(chosen, now)
            return None
        if hedge:
            state.hedges.take(chosen.units)
        return choice

    def _may_try_again(self) -> bool:
        """Whether the node's budget has one more attempt. A call whose caller has tokens gets it in any case."""
        return self._shape.forwarded or self._state.retries.may_retry() or self._progress.begun

    # --- ends --------------------------------------------------------------------------------------------------------

    def _begins(self, running: _Attempt, now: float) -> None:
        """Its first event came: it works."""
        running.began = True
        reservation, took = running.reservation, now - running.record.started
        self._state.deadlines.saw_first_token(reservation.replica, took, self._predicted(reservation), now)
        self._state.ledger.began(reservation)

    def _gave_up(self, running: _Attempt, failure: Failure, now: float) -> None:
        """What an attempt's end without an answer means for the call, and teaches of the replica."""
        self._last = failure
        reservation = running.reservation
        self._progress.ended(reservation.replica, failure, now, running.record.tokens)
        lesson = lesson_of(failure)
        if lesson is None:
            return
        ledger = self._state.ledger
        if lesson.cache_lost:
            ledger.cache_lost(reservation.replica)
            self._state.deadlines.forget(reservation.replica)
        who = reservation.node if lesson.blame is Blame.NODE else reservation.replica
        ledger.failed(who, lesson.seconds, now, late=failure.kind == LATE)

    def _end(self, running: _Attempt, outcome: str, now: float) -> None:
        del self._running[running.number]
        running.record.outcome = outcome
        running.record.ended = now
        self._state.ledger.release(running.reservation, now)

    def _stop_all(self, outcome: str, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for running in list(self._running.values()):
            self._end(running, outcome, now)
            effects.append(Stop(running.number))
        return effects

    def _fail(self, failure: Failure, now: float) -> Effects:
        self.over = True
        effects = self._stop_all(failure.kind, now)
        effects.append(Fail(failure))
        return effects

    def _because(self) -> str:
        return "a replica came" if self._last is None else f"after {self._last.kind}"

    def _armed(self, effects: list[Effect], now: float) -> list[Effect]:
        """With a `Wake` where the next thing is due earlier than the one that was asked for."""
        # Late is the call when all that run are: the first one's time alone means nothing, and would wake it again and again.
        late = max((each.due for each in self._running.values()), default=inf)
        nexts = (self._hedge_at, late) if self._running else (self._again_at,)
        due = min(self._shape.deadline, *nexts)
        if due < self._wake_at:
            self._wake_at = max(due, now)
            effects.append(Wake(self._wake_at))
        return effects
