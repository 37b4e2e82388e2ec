"""From a model's name to an answer: one call's machine for each call, and what all calls of this node share.

Law of this file: it knows candidates and targets, never workers, sockets or devices, so its tests need two fakes and no network. It decides
nothing that `core.call_machine` decides, and does nothing that `call_driver` does.

The node that has the caller is in charge of the call from its first to its last byte. A call that came from a peer (`hops`) is run here
once or not at all, so there are no loops; whoever sent it tries elsewhere.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from typing import cast

from tars.core.call_effects import ANSWERED, DEADLINE, CallShape, Failure
from tars.core.call_machine import CallMachine
from tars.core.prefix_affinity import blocks_of
from tars.core.routing import Candidate, rank
from tars.core.routing_state import RoutingState
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState
from tars.errors import DeadlineExceeded, StaleRoute, StillLoading, TarsError
from tars.messages.base import CallContext
from tars.messages.inference import ChatParams, CompleteParams, GenerationParams
from tars.serving.call_driver import CallDriver, Routed
from tars.serving.call_record import CallRecords
from tars.serving.continuation import Generation, seeded
from tars.serving.demand import demand_of, prompt_text
from tars.serving.fleet import Fleet, ServedModel, draining_error, no_replica_error
from tars.serving.idempotency import seed_of
from tars.serving.model_names import resolve
from tars.workers.engine import Work

__all__ = ["Fleet", "Router", "ServedModel", "draining_error", "no_replica_error"]

log = logging.getLogger(__name__)

SHARE_PART = 0.05
"""Of the time left, that is kept for saying what it was spent on: whoever holds the call's place ends it without knowing that."""
SHARE_MOST_SECONDS = 0.2
"""At most; several turns of a busy loop."""


class Router:
    """See the module's law. `now` is the monotonic clock, `on_traffic` hears of each peer that answers: it lives.

    `exact`: a broken answer goes on only where the text stays the same. `rng` spreads waits and cooldowns.
    """

    def __init__(
        self,
        fleet: Fleet,
        now: Callable[[], float] = time.monotonic,
        on_traffic: Callable[[NodeId], None] = lambda node: None,
        *,
        exact: bool = False,
        records: CallRecords | None = None,
        rng: random.Random | None = None,
    ):
        self._fleet = fleet
        self._on_traffic = on_traffic
        self._now = now
        self._exact = exact
        self._records = records
        self._rng = rng or random.Random()
        self.state = RoutingState.with_dice(self._rng)
        """What all calls of this node share."""
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._at_peers: Counter[tuple[NodeId, str]] = Counter()
        self._from_peers = 0
        self.draining = False
        """This node's own replicas take no new calls; those of its peers do."""

    def resolve(self, name: str | None, kind: ModelKind) -> ServedModel:
        """The model that `name` (or an alias) means: see `model_names.resolve`."""
        return resolve(name, kind, self._fleet.models(), self._fleet.loadable)

    def can_take(self, model: ServedModel, call: CallContext) -> bool:
        """False where only replicas that are being drained are left for the call."""
        return not self.draining or any(each.state is ReplicaState.READY for each in self._candidates(model.name, call))

    async def run(self, model: ServedModel, work: Work, call: CallContext) -> AsyncGenerator[Routed]:
        """The answer's events, whichever replicas they are from, each with who served it; the last one's attempts are all. While a load is
        waited for, `Progress` and None. Close it to cancel. Raises `TarsError`s.
        """
        forwarded = call.hops > 0
        self._from_peers += forwarded
        if isinstance(work, ChatParams | CompleteParams) and not forwarded:
            work = _with_seed(work, call)
        name = model.name
        seen: Sequence[Candidate] | None = self._candidates(name, call)

        def candidates() -> Sequence[Candidate]:
            # The first look is the machine's, too: nothing happens in between.
            nonlocal seen
            found, seen = seen, None
            return self._candidates(name, call) if found is None else found

        machine = CallMachine(
            CallShape(
                key=call.trace_id,
                model=name,
                deadline=self._ends(call),
                streams=isinstance(work, GenerationParams),
                demand=demand_of(work),
                blocks=blocks_of(prompt_text(work)) if seen is not None and len(seen) > 1 else (),
                answers=work.n if isinstance(work, GenerationParams) else 1,
                forwarded=forwarded,
                shown=call.streamed,
                file_sha256=call.file_sha256 if call.resume is None else call.resume.file_sha256,
                exact=self._exact,
            ),
            self.state,
            candidates,
            self._rng,
        )
        record = None if self._records is None else self._records.open(call, name)
        if record is not None:
            record.attempts = machine.attempts
        driver = CallDriver(
            machine,
            self._fleet,
            name,
            work,
            call,
            self._now,
            self._failure,
            self.state.ledger,
            record,
            may_load=not model.deployed,
        )
        try:
            driver.begin()
            while (item := await driver.next()) is not None:
                yield item
        finally:
            await driver.close()
            self._count(driver)

    # --- what was learned --------------------------------------------------------------------------------------------

    def load_told(self, loads: Iterable[tuple[str, int, int]]) -> None:
        """A peer's own word on its replicas, as it rides on its probes' answers: (replica, active calls, queued calls)."""
        self.state.ledger.told(loads, self._now())

    def ranked(self, model: str) -> Mapping[ReplicaId, str]:
        """For people: how each replica of a model stands for a usual call now, and why."""
        now = self._now()
        candidates = [self.state.ledger.annotated(each, now) for each in self._fleet.candidates(model)]
        return rank(candidates, "").reasons

    def attempts(self) -> Mapping[tuple[str, str], int]:
        """Replicas that were asked since the start, by why (`first`, `retry`, `hedge`, `continuation`) and outcome."""
        return self._attempts

    def calls_at_peers(self) -> Mapping[tuple[NodeId, str], int]:
        """Those of them that were at peers, by node and outcome (`answered`, an error's kind, `late`, `hedge_lost`, `cancelled`)."""
        return self._at_peers

    @property
    def calls_from_peers(self) -> int:
        """Calls that peers sent here."""
        return self._from_peers

    # --- inside ------------------------------------------------------------------------------------------------------

    def _ends(self, call: CallContext) -> float:
        """When the call ends here: a moment before its caller's face gives it up, which knows less of what it waits for."""
        remaining = call.deadline.remaining(self._now())
        return call.deadline.at - min(SHARE_MOST_SECONDS, remaining * SHARE_PART)

    def _candidates(self, model: str, call: CallContext) -> Sequence[Candidate]:
        candidates = self._fleet.candidates(model)
        if not self.draining and not call.hops:
            return candidates
        return [each for each in candidates if (not self.draining if each.local else not call.hops)]

    def _count(self, driver: CallDriver) -> None:
        """A call is over."""
        for number, each in enumerate(driver.machine.attempts):
            self._attempts[each.why(number), each.outcome] += 1
            if number in driver.at_peers and number not in driver.mistakes:
                self._at_peers[each.node, each.outcome] += 1
                if each.outcome == ANSWERED:
                    self._on_traffic(each.node)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("call %s: %s", driver.trace_id, [each.ranked.reasons for each in driver.machine.attempts])

    def _failure(self, failure: Failure, driver: CallDriver) -> TarsError:
        """The caller's error: that of the last replica, what was waited for in vain, or why there is nobody at all."""
        error = failure.error if isinstance(failure.error, TarsError) else None
        if error is None or isinstance(error, StaleRoute):
            error = self._without_answer(failure, driver)
        attempts = driver.attempts()
        if len(attempts) > 1:
            # Over what a peer said of its own tries: these are the ones that this node made.
            error.details["attempts"] = [each.model_dump() for each in attempts]
        return error

    def _without_answer(self, failure: Failure, driver: CallDriver) -> TarsError:
        model, forwarded = driver.model, driver.forwarded
        if failure.kind == DEADLINE.kind:
            return self._too_late(driver)
        if self.draining:
            return draining_error()
        why = self._fleet.not_ready(model)
        if forwarded:
            return StaleRoute(
                f"this node has no ready replica of {model} now ({why.message}); another one may",
                details={"cause": why.kind},
            )
        return why

    def _too_late(self, driver: CallDriver) -> TarsError:
        """The time is over: what it was spent on."""
        if driver.waits_for_load:
            why = self._fleet.not_ready(driver.model)
            if isinstance(why, StillLoading):
                return StillLoading(
                    f"{why.message}. The call waited for it until its time budget ended; the load goes on. Send the call again, or "
                    "give it a larger timeout_ms.",
                    retry_after_ms=why.retry_after_ms,
                    details=why.details,
                )
            return why
        attempts = driver.machine.attempts
        if not attempts:
            return DeadlineExceeded("the call's time budget ran out before a replica could take it; allow more time")
        last = driver.last_error
        tries = f"{len(attempts)} attempt{'s' * (len(attempts) > 1)}"
        return DeadlineExceeded(
            f"the call's time budget ran out after {tries}"
            + ("" if last is None else f", of which the last to fail said: {last.message}")
            + "; the work was stopped. Give it a larger timeout_ms.",
            details={} if last is None else {"cause": last.kind},
        )


def _with_seed(work: Generation, call: CallContext) -> Generation:
    """The same with a seed: every attempt draws the same numbers, and so does every computation under one idempotency key."""
    seed = seed_of(call) if work.seed is None else None
    return seeded(work) if seed is None else cast("Generation", work.model_copy(update={"seed": seed}))
