"""The engines of one simulated node: sequences in slots, a bounded queue, and tokens that are a function of file, seed and position.

Law of this file: it computes and gives away; who asked and what becomes of it is `virtual_gateway`'s. A replica steps while it has work:
each step gives every sequence in a slot its next few tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

from breach import Breach
from virtual_executor import Running
from virtual_fleet import content_of

from tars.core.call_effects import Failure
from tars.core.replica_ledger import Observation
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState

if TYPE_CHECKING:
    from virtual_node import VirtualNode

QUEUE = 12
"""Calls that wait for a replica; what comes then is refused."""
STEP_SECONDS = 0.08
PREFILL_SECONDS = 0.05
REPLAY_SECONDS = 0.004
"""For each token that is replayed."""
FETCH_SECONDS = 0.03
"""For a saved state, instead."""
EMBED_SECONDS = 0.03
SLOW_EMBED_SECONDS = 0.6
SLOW_SHARE = 0.08


@dataclass(frozen=True, slots=True)
class Work:
    """What a caller wants. `seed` decides every token; an embedding is one token, and its `length` counts texts."""

    id: str
    model: str
    seed: int
    length: int
    deadline: float
    answers: int = 1
    streams: bool = True
    shown: bool = True
    """The caller sees the tokens as they come."""


@dataclass(frozen=True, slots=True)
class SavedSequence:
    """A sequence's state as its node keeps it for a successor."""

    node: NodeId
    file: str
    positions: tuple[int, ...]


class Sink(Protocol):
    """Who hears of a sequence."""

    def gave(self, index: int, ids: Sequence[int], file: str) -> None: ...

    def done(self, seen: Observation) -> None: ...

    def broke(self, failure: Failure) -> None: ...


@cache
def _number(file: str) -> int:
    return crc32(file.encode())


def token_of(file: str, seed: int, index: int, position: int) -> int:
    """The token of answer `index` at `position`."""
    return (_number(file) + seed * 7919 + index * 104_729 + position * (position + 31) * 613) % 50_021


@dataclass(slots=True, eq=False)
class Sequences:
    """One call in a replica: `answers` sequences that go on together."""

    work: Work
    sink: Sink
    positions: list[int]
    prefill: float
    began: float
    waits: bool = True
    over: bool = False


@dataclass(slots=True, eq=False)
class _Replica:
    running: Running
    active: list[Sequences] = field(default_factory=list)
    queue: deque[Sequences] = field(default_factory=deque)
    steps: bool = False
    frozen_until: float = 0.0


class VirtualEngine:
    """See the module's law. One per process."""

    def __init__(self, node: VirtualNode):
        self._node = node
        self._replicas: dict[ReplicaId, _Replica] = {}

    def run(
        self, replica: ReplicaId, work: Work, resume: Sequence[Sequence[int]] | None, saved: object, sink: Sink
    ) -> Sequences:
        """Begin, or refuse (both are told later). `resume`: the tokens of each answer so far."""
        now = self._node.time.now
        so_far = resume or [()] * work.answers
        positions = [len(each) for each in so_far]
        started = Sequences(work, sink, positions, PREFILL_SECONDS + REPLAY_SECONDS * sum(positions), now)
        place = self._place(replica)
        refusal = self._refusal(place, work, so_far, saved)
        if isinstance(saved, SavedSequence):
            started.prefill = FETCH_SECONDS
        elif not work.streams:
            started.prefill = SLOW_EMBED_SECONDS if self._node.engine_dice.random() < SLOW_SHARE else EMBED_SECONDS
        if refusal is not None or place is None:
            started.over = True
            self._node.later(0.0, lambda: sink.broke(refusal or Failure("stale_route")))
            return started
        place.queue.append(started)
        self._admit(place)
        return started

    def stop(self, sequences: Sequences) -> None:
        """Its slot is free at the next step."""
        sequences.over = True

    def load(self, replica: ReplicaId) -> tuple[int, int]:
        """Calls in slots, and calls that wait."""
        place = self._replicas.get(replica)
        return (0, 0) if place is None else (len(place.active), len(place.queue))

    def freeze(self, replica: ReplicaId, seconds: float) -> None:
        """Its worker is stopped for so long, and the node does not know."""
        place = self._place(replica)
        if place is not None:
            place.frozen_until = self._node.time.now + seconds

    def frozen(self, replica: ReplicaId) -> bool:
        place = self._replicas.get(replica)
        return place is not None and place.frozen_until > self._node.time.now

    def check(self) -> None:
        """A replica changed: what was in one that is no longer ready is handed over, or broke with its worker."""
        for replica, place in list(self._replicas.items()):
            state = place.running.state
            if state is ReplicaState.READY:
                continue
            del self._replicas[replica]
            for sequences in (*place.active, *place.queue):
                if sequences.over:
                    continue
                sequences.over = True
                sequences.sink.broke(self._why(place, sequences, state))

    def busy(self) -> int:
        """Calls that it works on, or would."""
        return sum(not each.over for place in self._replicas.values() for each in (*place.active, *place.queue))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _place(self, replica: ReplicaId) -> _Replica | None:
        running = next((each for each in self._node.executor.all() if each.assignment.replica == replica), None)
        if running is None or running.state is not ReplicaState.READY:
            return None
        place = self._replicas.get(replica)
        if place is None or place.running is not running:
            place = self._replicas[replica] = _Replica(running)
        return place

    def _refusal(
        self, place: _Replica | None, work: Work, so_far: Sequence[Sequence[int]], saved: object
    ) -> Failure | None:
        if place is None:
            return Failure("stale_route")
        file = content_of(place.running.assignment)
        for index, ids in enumerate(so_far):
            if list(ids) != [token_of(file, work.seed, index, position) for position in range(len(ids))]:
                raise Breach(f"{work.id} goes on in {file} from tokens that are not its own: {list(ids)}")
        if isinstance(saved, SavedSequence) and saved.file != file:
            raise Breach(f"{work.id} goes on in {file} from a state of {saved.file}")
        waiting = [each for each in place.queue if not each.over]
        wait = sum(each.work.length for each in waiting) / 2 * STEP_SECONDS / place.running.assignment.settings.slots
        if len(waiting) >= QUEUE or wait > work.deadline - self._node.time.now:
            return Failure("overloaded", retry_after=round(max(0.1, wait), 3))
        return None

    @staticmethod
    def _why(place: _Replica, sequences: Sequences, state: ReplicaState) -> Failure:
        if state is not ReplicaState.STOPPING:
            return Failure("worker_crashed", sent=True)
        if sequences.waits:
            return Failure("draining", known=True)
        file = content_of(place.running.assignment)
        saved = SavedSequence(place.running.assignment.node, file, tuple(sequences.positions))
        return Failure("draining", known=True, saved=saved if sequences.work.streams else None)

    def _admit(self, place: _Replica) -> None:
        slots = place.running.assignment.settings.slots
        while place.queue and len(place.active) < slots:
            sequences = place.queue.popleft()
            if not sequences.over:
                sequences.waits = False
                place.active.append(sequences)
        if place.active and not place.steps:
            place.steps = True
            self._again(place)

    def _again(self, place: _Replica) -> None:
        seconds = STEP_SECONDS if place.running.kind is ModelKind.CHAT else EMBED_SECONDS
        self._node.later(seconds, lambda: self._step(place))

    def _step(self, place: _Replica) -> None:
        now = self._node.time.now
        if self._replicas.get(place.running.assignment.replica) is not place:
            return
        if place.frozen_until > now:
            self._node.later(place.frozen_until - now, lambda: self._step(place))
            return
        file = content_of(place.running.assignment)
        for sequences in place.active:
            if sequences.over or now < sequences.began + sequences.prefill:
                continue
            if sequences.work.streams:
                self._decode(sequences, file)
            else:
                self._embed(sequences, file, now)
        place.active = [each for each in place.active if not each.over]
        place.steps = False
        self._admit(place)

    def _decode(self, sequences: Sequences, file: str) -> None:
        work = sequences.work
        for index in range(work.answers):
            position = sequences.positions[index]
            count = min((work.seed + position) % 4, work.length - position)
            if position == 0 or not count:
                count = min(1, work.length - position)
            if count:
                sequences.positions[index] += count
                ids = [token_of(file, work.seed, index, each) for each in range(position, position + count)]
                sequences.sink.gave(index, ids, file)
                if sequences.over:
                    return
        if all(position >= work.length for position in sequences.positions):
            sequences.over = True
            units = float(work.length * work.answers)
            sequences.sink.done(Observation(units, units / 2 * STEP_SECONDS, units, waited=False))

    @staticmethod
    def _embed(sequences: Sequences, file: str, now: float) -> None:
        sequences.over = True
        sequences.sink.gave(0, [token_of(file, sequences.work.seed, 0, 0)], file)
        sequences.sink.done(Observation(float(sequences.work.length), now - sequences.began))
