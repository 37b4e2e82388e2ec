"""What a failure means for a call: whether it is tried again, what that costs, how long to wait, and what the failure teaches of a replica.

Law of this file: pure functions of a `Failure`; what a call has behind it is `call_machine`'s.

A retry is paid from the node's retry budget where the failure says "too much work" (overloaded, late): only there does one more try make
it worse. What failed because capacity went away (a dead node, a crashed worker, a route that was stale) did not load anybody; such retries
are bounded by the replicas there are, by the waits in between and, for work that may itself have killed its worker, by `MOST_KILLS_HERE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tars.core.call_effects import LATE, Failure

OVERLOADED = "overloaded"
PEER_UNREACHABLE = "peer_unreachable"
WORKER_CRASHED = "worker_crashed"
FINAL = frozenset({"deadline_exceeded", "cancelled"})
"""The call itself is over."""
STALE = frozenset({"stale_route", "unknown_model"})
"""A peer that does not have what its advert said. This node knows the model, or there would be no call."""
TOO_MUCH_WORK = frozenset({OVERLOADED, LATE})

MOST_KILLS_HERE = 2
"""Workers that a call may lose at one and the same token before it is taken for what kills them: the second one may be chance."""
MOST_KILLS = 4
"""Workers that it may lose in all, with tokens in between."""

AVOID_UNREACHABLE_SECONDS = 5.0
"""A peer that was not reached is asked last for so long: membership knows by then whether it is dead."""
AVOID_FAILED_SECONDS = 2.0
"""A replica that could not take a call: loading, crashed, gone, late. Adverts say so within a second or two."""
AVOID_OVERLOADED_SECONDS = 1.0
"""At most: a full queue moves on within one short answer."""
AVOID_LEAST_SECONDS = 0.1


class Blame(StrEnum):
    """Who is asked last for a while."""

    NODE = "node"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a failure teaches. `cache_lost`: what the replica had computed of prompts is not there any more."""

    blame: Blame
    seconds: float
    cache_lost: bool = False


def may_go_on(failure: Failure) -> bool:
    """Whether another try can help at all. A caller's own mistake is never tried again, a peer that knows less than its advert is."""
    if failure.kind in STALE:
        return True
    return failure.retryable and not failure.callers_fault and failure.kind not in FINAL


def needs_budget(failure: Failure) -> bool:
    """Whether a retry is refused where the node's retry budget is spent."""
    return failure.kind in TOO_MUCH_WORK


def may_have_killed(failure: Failure) -> bool:
    """Whether the call may be what ended the process that ran it: it was under way there, and the mesh knows no other reason."""
    return failure.sent and not failure.known and failure.kind in (WORKER_CRASHED, PEER_UNREACHABLE)


def lesson_of(failure: Failure) -> Lesson | None:
    """What it teaches of the replica or of its node; None where it says nothing of them."""
    if failure.callers_fault or failure.kind in FINAL:
        return None
    if failure.kind == PEER_UNREACHABLE:
        return Lesson(Blame.NODE, AVOID_UNREACHABLE_SECONDS)
    if failure.kind == OVERLOADED:
        wait = failure.retry_after or 0.0
        return Lesson(Blame.REPLICA, min(AVOID_OVERLOADED_SECONDS, max(AVOID_LEAST_SECONDS, wait)))
    if not may_go_on(failure):
        return None
    return Lesson(Blame.REPLICA, AVOID_FAILED_SECONDS, cache_lost=failure.kind != LATE)
