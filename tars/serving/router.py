"""From a model's name to an answer: which replica, and which one next when that one cannot.

Law of this file: it knows candidates and targets, never workers, sockets or devices, so its tests need two fakes and no network.

Before the first event a retryable failure moves the call to the next-ranked replica. What may have run already (its worker crashed, its
peer was lost in the middle) is tried once more and not on every replica of the mesh, so that a call which kills whoever takes it ends.
Work without deltas (embed, rerank, tokenize) has its answer for a first event, so for it this covers everything; a stream that broke
after its first delta is the caller's to see (continuation of broken streams is a later issue).

A call that came from a peer (`hops`) is run here or not at all, so there are no loops.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import cast

from tars.core.prefix_affinity import Block, blocks_of
from tars.core.replica_ledger import ReplicaLedger, Reservation
from tars.core.routing import HOP_SECONDS, Candidate, rank
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState
from tars.errors import (
    DeadlineExceeded,
    Overloaded,
    PeerUnreachable,
    ServerStateError,
    StaleRoute,
    StillLoading,
    TarsError,
    WorkerCrashed,
)
from tars.messages.base import CallContext
from tars.messages.inference import Attempt, Delta, ServedBy
from tars.serving.demand import demand_of, observed, prompt_text
from tars.serving.fleet import Fleet, ServedModel, draining_error, no_replica_error
from tars.serving.model_names import resolve
from tars.serving.targets import Target
from tars.workers.engine import Event, Finished, Work

__all__ = ["Fleet", "Router", "ServedModel", "draining_error", "no_replica_error"]

log = logging.getLogger(__name__)

AVOID_UNREACHABLE_SECONDS = 5.0
"""A peer that was not reached is asked last for so long: membership knows by then whether it is dead."""
AVOID_FAILED_SECONDS = 2.0
"""A replica that could not take a call: loading, crashed, gone. Adverts say so within a second or two."""
AVOID_OVERLOADED_SECONDS = 1.0
"""At most: a full queue moves on within one short answer."""
MOST_TRIES = 8
"""Replicas that one call asks: beyond it the mesh is in trouble, and the caller had better hear of it."""


class Router:
    """See the module's law. `now` is the monotonic clock, `on_traffic` hears of each peer that answers: it lives."""

    def __init__(
        self,
        fleet: Fleet,
        now: Callable[[], float] = time.monotonic,
        on_traffic: Callable[[NodeId], None] = lambda node: None,
    ):
        self._fleet = fleet
        self._on_traffic = on_traffic
        self._now = now
        self._ledger = ReplicaLedger()
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

    async def run(self, model: ServedModel, work: Work, call: CallContext) -> AsyncGenerator[tuple[Event, ServedBy]]:
        """Events of the first replica that can, each with who served it (tried replicas included). Close it to cancel."""
        self._from_peers += call.hops > 0
        attempts: list[Attempt] = []
        tried: set[ReplicaId] = set()
        blocks: tuple[Block, ...] | None = None
        demand = demand_of(work)
        last: TarsError | None = None
        may_have_run = 0
        while len(tried) < MOST_TRIES and may_have_run < 2:
            if call.deadline.passed(self._now()):
                raise DeadlineExceeded("the call's time budget ran out before a replica could take it; allow more time")
            # From here to the reservation there is no await: of calls that come together each sees those before it.
            candidates = self._candidates(model.name, call)
            if blocks is None:
                blocks = blocks_of(prompt_text(work)) if len(candidates) > 1 else ()
            choice = self._ledger.choose(candidates, call.trace_id, self._now(), demand, blocks, tried)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("call %s: %s", call.trace_id, choice.ranked.reasons)
            reservation = choice.reservation
            if reservation is None:
                break
            replica, local = reservation.replica, reservation.local
            tried.add(replica)
            began = False
            started = self._now()
            target: Target | None = None
            try:
                target = self._fleet.target(replica)
                served_by = target.served_by
                async with aclosing(cast("AsyncGenerator[Event]", target.run(work, call))) as events:
                    async for event in events:
                        if not began:
                            began = True
                            attempts.append(Attempt(replica=replica, node=served_by.node, outcome="answered"))
                            served_by = served_by.model_copy(update={"attempts": attempts})
                        if not isinstance(event, Delta):
                            served_by = self._answered(reservation, event, target, attempts, call, local, started)
                        yield event, served_by
                return
            except KeyError:
                if target is not None:
                    raise
                continue  # it went away between two looks
            except (ServerStateError, StillLoading) as error:
                self._count(reservation.node, local, error.kind)
                if not error.retryable or isinstance(error, DeadlineExceeded):
                    raise
                self._avoid(reservation, error)
                if began:
                    raise
                attempts.append(Attempt(replica=replica, node=reservation.node, outcome=error.kind))
                may_have_run += _may_have_run(error)
                last = error
            finally:
                self._ledger.release(reservation, self._now())
        raise self._failure(model, call, last, attempts)

    # --- what was learned --------------------------------------------------------------------------------------------

    def load_told(self, loads: Iterable[tuple[str, int, int]]) -> None:
        """A peer's own word on its replicas, as it rides on its probes' answers: (replica, active calls, queued calls)."""
        self._ledger.told(loads, self._now())

    def ranked(self, model: str) -> Mapping[ReplicaId, str]:
        """For people: how each replica of a model stands for a usual call now, and why."""
        now = self._now()
        candidates = [self._ledger.annotated(each, now) for each in self._fleet.candidates(model)]
        return rank(candidates, "").reasons

    def calls_at_peers(self) -> Mapping[tuple[NodeId, str], int]:
        """Calls that were sent to peers since the start, by node and outcome (`answered`, or an error's kind)."""
        return self._at_peers

    @property
    def calls_from_peers(self) -> int:
        """Calls that peers sent here."""
        return self._from_peers

    # --- inside ------------------------------------------------------------------------------------------------------

    def _candidates(self, model: str, call: CallContext) -> Sequence[Candidate]:
        candidates = self._fleet.candidates(model)
        if not self.draining and not call.hops:
            return candidates
        return [each for each in candidates if (not self.draining if each.local else not call.hops)]

    def _answered(
        self,
        reservation: Reservation,
        event: Finished,
        target: Target,
        attempts: list[Attempt],
        call: CallContext,
        local: bool,
        started: float,
    ) -> ServedBy:
        """Learn from an answer; who served it, by its own word."""
        now = self._now()
        self._count(reservation.node, local, "answered")
        seen = observed(event, now - started)
        if seen is not None:
            # What the replica measured itself has no way in it.
            self._ledger.learn(reservation, seen, now, 0.0 if local or not seen.waited else HOP_SECONDS)
        self._ledger.release(reservation, now)
        served_by = target.served_by
        if served_by.calls_left is not None:
            self._ledger.told([(served_by.replica, served_by.calls_left, 0)], now)
        # The peer that asked routes by it; nobody else needs it.
        left = self._ledger.in_flight(reservation.replica) if call.hops and local else None
        return served_by.model_copy(update={"attempts": attempts, "calls_left": left})

    def _avoid(self, reservation: Reservation, error: TarsError) -> None:
        """What a failure teaches: ask others first for a while."""
        now = self._now()
        if isinstance(error, PeerUnreachable):
            self._ledger.failed(reservation.node, AVOID_UNREACHABLE_SECONDS, now)
        elif isinstance(error, Overloaded):
            wait = (error.retry_after_ms or 0) / 1000
            self._ledger.failed(reservation.replica, min(AVOID_OVERLOADED_SECONDS, max(0.1, wait)), now)
        else:
            # Whatever it was, its cache is not what it was.
            self._ledger.cache_lost(reservation.replica)
            self._ledger.failed(reservation.replica, AVOID_FAILED_SECONDS, now)

    def _count(self, node: NodeId, local: bool, outcome: str) -> None:
        if not local:
            self._at_peers[node, outcome] += 1
            if outcome == "answered":
                self._on_traffic(node)

    def _failure(
        self, model: ServedModel, call: CallContext, last: TarsError | None, attempts: Sequence[Attempt]
    ) -> TarsError:
        """Nobody could: the last one's own error, or why there is nobody at all."""
        if last is not None and not isinstance(last, StaleRoute):
            if len(attempts) > 1:
                # Over what a peer said of its own tries: these are the ones that this node made.
                last.details["attempts"] = [each.model_dump() for each in attempts]
            return last
        if self.draining:
            return draining_error()
        why = self._fleet.not_ready(model.name)
        if call.hops:
            return StaleRoute(
                f"this node has no ready replica of {model.name} now ({why.message}); another one may",
                details={"cause": why.kind},
            )
        return why


def _may_have_run(error: TarsError) -> bool:
    """True where the call may have been under way when it failed. A peer that was never reached says so."""
    return isinstance(error, WorkerCrashed) or (isinstance(error, PeerUnreachable) and error.details.get("sent", True))
