"""Which replica answers a call, and why the others did not.

Law of this file: `rank` is pure; what it ranks by is in its arguments, what it decided is in its result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tars.core.types import ModelKind, ReplicaId, ReplicaState

UNITS_PER_CALL = 128.0
"""Tokens of an answer (texts of a request) that a replica is taken to make for a call before any call was measured."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica as the router sees it. `seconds_per_call` is a mean of what was measured, None before the first call; `speed` is what
    it measured of itself when it was loaded, in tokens (texts) a second, None where it did not.
    """

    replica: ReplicaId
    model: str
    kind: ModelKind
    state: ReplicaState
    active: int = 0
    queued: int = 0
    slots: int = 1
    seconds_per_call: float | None = None
    speed: float | None = None


@dataclass(frozen=True, slots=True)
class Ranked:
    """`order`: ready replicas, best first. `reasons`: one line for each candidate, chosen or not."""

    order: tuple[ReplicaId, ...]
    reasons: dict[ReplicaId, str]


def predicted_seconds(candidate: Candidate, units_per_call: float = UNITS_PER_CALL) -> float:
    """Time until a new call would be done: calls ahead of it over slots, plus its own turn, times the measured mean.

    A replica that answered no call yet is taken at its own speed for `units_per_call`; without even that it counts one second a call, so
    that queues still decide.
    """
    own = candidate.seconds_per_call
    if own is None:
        own = units_per_call / candidate.speed if candidate.speed else 1.0
    ahead = candidate.active + candidate.queued
    return (ahead / max(1, candidate.slots) + 1) * own


def units_per_call(candidates: Sequence[Candidate]) -> float:
    """What a call to this model asks for, in tokens (texts): the mean over the replicas that answered some, so that a cold replica is
    compared with a warm one in the same measure. `UNITS_PER_CALL` before the first.
    """
    known = [each.seconds_per_call * each.speed for each in candidates if each.seconds_per_call and each.speed]
    return sum(known) / len(known) if known else UNITS_PER_CALL


def rank(candidates: Sequence[Candidate], call_key: str) -> Ranked:
    """Order the ready candidates by predicted completion; ties are spread over calls by rendezvous hash of `call_key`."""
    ready = [each for each in candidates if each.state is ReplicaState.READY]
    units = units_per_call(candidates)

    def place(each: Candidate) -> tuple[float, bytes]:
        return predicted_seconds(each, units), hashlib.blake2b(
            f"{call_key}|{each.replica}".encode(), digest_size=8
        ).digest()

    order = tuple(each.replica for each in sorted(ready, key=place))
    reasons: dict[ReplicaId, str] = {}
    for each in candidates:
        if each.state is not ReplicaState.READY:
            reasons[each.replica] = f"not ready: {each.state.value}"
        else:
            position = order.index(each.replica) + 1
            reasons[each.replica] = (
                f"rank {position}: predicted {predicted_seconds(each, units):.3f} s "
                f"({each.active} active, {each.queued} queued, {each.slots} slots)"
            )
    return Ranked(order, reasons)
