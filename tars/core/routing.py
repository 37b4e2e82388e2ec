"""Which replica answers a call, and why the others did not.

Law of this file: `rank` is pure; what it decides by is in its arguments, what it decided is in its result. What a node learns of its
replicas while calls run (who is busy, how fast, who failed lately) is `replica_ledger`'s.

The prediction for a new call on a replica, in seconds:

    (units ahead of it / slots + its own units) / speed  +  prompt tokens not in the replica's cache / prefill speed  +  the way there

Units are tokens of an answer, or texts of a request. Replicas that go first by it are equal within rounding are told apart by a hash of
the call, so that nobody prefers the first one of a list.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tars.core.health import BreakerState
from tars.core.mesh_messages import MemberState
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState

UNITS_PER_CALL = 128.0
"""Tokens of an answer (texts of a request) that a call is taken to ask for before any call was measured."""
HOP_SECONDS = 0.0015
"""What a call costs more at a peer: one more pass through HTTP and JSON-RPC, and a LAN's round trip. Measured between two nodes in one
process over loopback (tests/serving/test_mesh_routing.py): 1.1 ms at the median, where the same call without the hop takes 0.8; a LAN adds
0.3 to 0.5."""
COLD_PART = 0.05
"""Of its own time that a replica which nobody used lately is taken to need more: clocks and caches have come down. Small on purpose: it
decides between equals."""
PREFILL_PART = 10.0
"""Prompt tokens a second for each answer token a second, where nobody measured them. Field notes: 1,400 to 110 on two cores; cards do
more."""
SECONDS_PER_UNIT = 1.0 / UNITS_PER_CALL
"""Where no replica's speed is known at all: a second a call, so that queues still decide."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica as the router sees it: the first part is what its node says of it, the second what this node learned itself."""

    replica: ReplicaId
    model: str
    kind: ModelKind
    state: ReplicaState
    node: NodeId = NodeId("")
    local: bool = True
    standing: MemberState = MemberState.ALIVE
    """How this node sees that node; only ALIVE, SUSPECT and DRAINING ones are offered."""
    active: int = 0
    queued: int = 0
    slots: int = 1
    speed: float | None = None
    """Tokens (texts) a second of one call alone, as it measured itself after its load."""
    prefill_speed: float | None = None
    """Prompt tokens a second, likewise."""
    cache_tokens: int = 0
    """Tokens that its KV cache holds: how much of earlier prompts can still be there."""
    file_sha256: str | None = None
    """Of all that it was loaded from: only a replica of the same files goes on where another one broke."""
    exact: bool = False
    """It computes so that a continuation is identical to an unbroken answer."""

    # --- learned here; see `replica_ledger` ---
    ahead: float | None = None
    """Units that it was given and has not answered; None: `active` and `queued` calls of the usual size."""
    measured: float | None = None
    """Units a second of one call alone, from the calls that this node sent there."""
    measured_prefill: float | None = None
    usual_units: float | None = None
    """What a call to it asked for, as a mean."""
    cold: bool = False
    """Nobody used it lately."""
    breaker: BreakerState = BreakerState.CLOSED
    """OPEN: a call failed there (or on its node) a moment ago, and others are asked first. HALF_OPEN: this call may find out."""
    cooldown: float = 0.0
    """Seconds until its open breaker lets one call try; 0 and OPEN: one is trying it just now."""
    shared_tokens: float = 0.0
    """Tokens of this call's prompt that it computed lately."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a call asks for. `units` None is "as calls to this model usually do", at most `most_units`."""

    units: float | None = None
    most_units: float = math.inf
    prompt_tokens: float = 0.0


USUAL = Demand()


@dataclass(frozen=True, slots=True)
class Ranked:
    """`order`: replicas that can take the call, best first. `seconds`: what was predicted for each of them."""

    order: tuple[ReplicaId, ...]
    seconds: Mapping[ReplicaId, float]
    candidates: Sequence[Candidate]
    units: float = UNITS_PER_CALL
    """What the call was taken to ask for."""
    otherwise: float = 1 / SECONDS_PER_UNIT
    """Units a second that were taken where no speed is known."""

    @property
    def reasons(self) -> dict[ReplicaId, str]:
        """One line for each candidate, chosen or not. Made when it is asked for: every call is ranked, few are looked into."""
        places = {replica: index for index, replica in enumerate(self.order, 1)}
        return {
            each.replica: _chosen(each, places[each.replica], self.seconds[each.replica])
            if each.replica in places
            else _left_out(each)
            for each in self.candidates
        }


def units_of(candidates: Sequence[Candidate], demand: Demand = USUAL) -> float:
    """What the call asks for, in tokens (texts): what it says itself, else the mean over the replicas that answered some, so that a cold
    replica is compared with a warm one in the same measure.
    """
    if demand.units is not None:
        return demand.units
    known = [each.usual_units for each in candidates if each.usual_units is not None]
    return min(demand.most_units, sum(known) / len(known) if known else UNITS_PER_CALL)


def usual_speed(candidates: Sequence[Candidate]) -> float:
    """Units a second of a replica of which nothing is known: the mean of the known ones, so that it is neither shunned nor preferred."""
    known = [speed for each in candidates if (speed := each.measured or each.speed)]
    return sum(known) / len(known) if known else 1 / SECONDS_PER_UNIT


def predicted_seconds(
    candidate: Candidate, units: float, prompt_tokens: float = 0.0, otherwise: float = 128.0
) -> float:
    """Time until a new call of `units` would be done; see the module's law. `otherwise`: the speed to take where none is known."""
    speed = candidate.measured or candidate.speed or otherwise
    return first_seconds(candidate, prompt_tokens, otherwise) + units / speed * (1 + COLD_PART * candidate.cold)


def first_seconds(candidate: Candidate, prompt_tokens: float, otherwise: float) -> float:
    """Time until a new call's first token would be here: the queue, its prompt, and the way there."""
    speed = candidate.measured or candidate.speed or otherwise
    ahead = candidate.ahead
    if ahead is None:
        ahead = (candidate.active + candidate.queued) * (candidate.usual_units or UNITS_PER_CALL)
    waiting = ahead / max(1, candidate.slots) / speed
    prefill = candidate.measured_prefill or candidate.prefill_speed or speed * PREFILL_PART
    computed = max(0.0, prompt_tokens - candidate.shared_tokens)
    return waiting + computed / prefill + (0.0 if candidate.local else HOP_SECONDS)


def standing_of(candidate: Candidate) -> int:
    """0 for a replica in good standing; then those whose breaker is open, on suspected nodes, on nodes that are being drained."""
    match candidate.standing:
        case MemberState.ALIVE:
            return 1 if candidate.breaker is BreakerState.OPEN else 0
        case MemberState.SUSPECT:
            return 2
        case MemberState.DRAINING:
            return 3
        case _:
            return 4


def may_take(candidate: Candidate) -> bool:
    """Whether a call can go there at all: its replica is ready, and its node neither dead nor gone."""
    return candidate.state is ReplicaState.READY and candidate.standing not in (MemberState.DEAD, MemberState.LEFT)


def rank(candidates: Sequence[Candidate], call_key: str, demand: Demand = USUAL) -> Ranked:
    """Order the ready candidates: by standing, then by predicted completion; ties are spread over calls by rendezvous hash of `call_key`.

    Nodes that are being drained are asked only where there is no other; dead ones and those that left never.
    """
    units = units_of(candidates, demand)
    otherwise = usual_speed(candidates)
    able = [each for each in candidates if may_take(each)]
    kept = [each for each in able if standing_of(each) < 3] or able
    seconds = {each.replica: predicted_seconds(each, units, demand.prompt_tokens, otherwise) for each in kept}

    def place(each: Candidate) -> tuple[int, float, bytes]:
        # Rounded to a nanosecond: sums of the same terms in another order are no difference.
        return standing_of(each), round(seconds[each.replica], 9), _hash(call_key, each.replica)

    # Most calls have one place to go: nothing to sort, nothing to hash.
    order = tuple(each.replica for each in (kept if len(kept) < 2 else sorted(kept, key=place)))
    return Ranked(order, seconds, candidates, units, otherwise)


def _hash(call_key: str, replica: ReplicaId) -> bytes:
    return hashlib.blake2b(f"{call_key}|{replica}".encode(), digest_size=8).digest()


def _chosen(each: Candidate, place: int, seconds: float) -> str:
    said = [f"{each.active} active, {each.queued} queued, {each.slots} slots"]
    if (speed := each.measured or each.speed) is not None:
        said.append(f"{speed:.4g} a second " + ("measured here" if each.measured else "by its own word"))
    if each.shared_tokens:
        said.append(f"about {each.shared_tokens:.0f} tokens of the prompt are there")
    if each.cold:
        said.append("not used lately")
    if not each.local:
        said.append("one hop away")
    if each.standing is not MemberState.ALIVE:
        said.append(f"its node is {each.standing.value}")
    elif each.breaker is BreakerState.OPEN:
        said.append(
            f"failed a moment ago, asked last for {each.cooldown:.1f} s more"
            if each.cooldown > 0
            else "failed a moment ago, and another call is finding out whether it works again"
        )
    elif each.breaker is BreakerState.HALF_OPEN:
        said.append("failed a moment ago, may be tried by one call")
    return f"rank {place}: predicted {seconds:.3f} s ({'; '.join(said)})"


def _left_out(each: Candidate) -> str:
    if each.state is not ReplicaState.READY:
        return f"not ready: {each.state.value}"
    if each.standing is MemberState.DRAINING:
        return "its node is being drained, and another one can take the call"
    return f"its node is {each.standing.value}"
