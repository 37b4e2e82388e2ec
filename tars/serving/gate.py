"""The door of one replica: what its engine can compute together is let in, the rest waits here, in a fair order, or is refused at once.

Law of this file: it drives `core.fair_queue` and `core.expected_wait` for one worker and knows no replica but its own. One event loop, no
lock: nothing awaits between reading and writing the same state.

Why not in the engine's own queue: what is in there cannot be reordered, so a caller who comes after another one's flood would wait for all
of it. Here waits everything but what keeps the engine busy: its slots and one call in four more, so that no slot is idle while the next
call comes; of texts as many as it looks at to make its batches, in at least `LEAST_CALLS` calls, for which it takes turns itself. How
much that is says `call_costs`.

A call is refused when it comes, where it would begin too late for its deadline or the queue is full; and while it waits, where that turns
out later, or somebody who has less in a full queue came. All of these are `Overloaded` and say when to come back. When the worker leaves
READY, all that waits goes through: the worker says itself why it takes nothing.

An answer that was broken off elsewhere and goes on here does not wait: its caller is in the middle of it, and the engine computes it
beside full slots where it can. There are only as many as a node that died had, and nobody else is let in before as many slots are idle.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from tars.core.expected_wait import Margin, ServiceRate, Start, latest_start, seconds_of, units_ahead
from tars.core.fair_queue import BATCH, INTERACTIVE, WEIGHTS, Entry, FairQueue, Priority
from tars.errors import Overloaded, TarsError
from tars.messages.base import CallContext
from tars.messages.node import WaitingDescription
from tars.serving.call_costs import LEFT_PART, Capacity, Costs
from tars.workers.engine import Finished, Work

RETRY_LEAST_SECONDS, RETRY_MOST_SECONDS = 0.2, 60.0
JITTER = 0.5
"""So much more than asked for, at most: who was refused together does not come back together."""


class Gate:
    """See the module's law. `capacity` is None while the worker is not ready."""

    def __init__(
        self,
        capacity: Callable[[], Capacity | None],
        queue_limit: int,
        now: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._capacity = capacity
        self._queue = FairQueue(queue_limit)
        self._now = now
        self._rng = rng or random.Random()
        self._rate = ServiceRate()
        self._margin = Margin()
        """Of an answer's time."""
        self._waits = {priority: Margin() for priority in WEIGHTS}
        """Of the waits: batch calls wait longer than their place in the queue says, for as long as interactive ones keep coming."""
        self._waiting: dict[Entry, Turn] = {}
        self._running: set[Turn] = set()
        self._room = 0.0
        """Of what runs."""
        self._costs = Costs()
        self._passed = 0
        self._refused: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Calls that wait here; those in the engine's own queue are the worker's."""
        return len(self._queue)

    def turn(self, call: CallContext, work: Work, *, begun: bool = False) -> Turn:
        """`async with`: from when it is the call's turn. Raises `Overloaded` from entering it.

        `begun`: its answer was broken off elsewhere, and its caller reads it already. It waits for nobody here.
        """
        return Turn(self, call, work, begun)

    def worker_changed(self) -> None:
        """The worker's state is another one: who waits may have nothing to wait for any more."""
        self._fill()

    def describe(self) -> WaitingDescription:
        """For `node.describe`."""
        capacity = self._capacity()
        expected = 0.0
        if capacity is not None:
            expected = seconds_of(self._ahead("", INTERACTIVE, 0.0, capacity), self._per_second(capacity))
        now = self._now()
        return WaitingDescription(
            interactive=self._queue.waiting(INTERACTIVE),
            batch=self._queue.waiting(BATCH),
            callers=len({entry.caller for entry in self._queue}),
            longest_ms=max((now - turn.came for turn in self._waiting.values()), default=0.0) * 1000,
            expected_ms=expected * 1000,
            passed=self._passed,
            refused=dict(self._refused),
        )

    # --- a call's way through (called by `Turn`) ---------------------------------------------------------------------

    async def enter(self, turn: Turn) -> None:
        """Return when it is the turn's turn. Raises `Overloaded`."""
        capacity = self._capacity()
        if capacity is None:
            return
        units, room = self._costs.expected(turn.work, capacity)
        entry = turn.entry = Entry(turn.call.caller, turn.call.priority or INTERACTIVE, units)
        turn.room = room
        now = turn.came = self._now()
        remaining = turn.call.deadline.remaining(now)
        rate = self._per_second(capacity)
        own = seconds_of(self._shared(units), rate)
        at_once = not self._queue and self._fits(room, capacity)
        # What texts cost is known: beside all that runs, these would not be done in time.
        hopeless = not capacity.generates and bool(self._running) and own * self._margin.mean > remaining
        if turn.begun or (at_once and not hopeless):
            if self._queue:
                self._queue.charge(entry.caller, entry.priority, units)
            else:
                self._queue.pass_by(entry)
            self._start(turn, now)
            self._note(capacity, now)
            return
        first_by = turn.call.first_by
        own *= self._margin.most
        ahead = self._ahead(entry.caller, entry.priority, room, capacity)
        waits = self._waits[entry.priority]
        wait = seconds_of(ahead, rate) * waits.mean
        latest = latest_start(remaining, own) if capacity.generates else remaining - own
        if first_by is not None:
            # Its caller goes away before.
            remaining = min(remaining, first_by.remaining(now))
            latest = min(latest, remaining)
        if wait > latest:
            raise self._refusal("late", _too_late(wait, own, remaining, len(self._queue)), wait - latest)
        gone = self._queue.add(entry)
        if gone is entry:
            raise self._refusal("full", _full(len(self._queue)), wait / 2)
        turn.place = asyncio.get_running_loop().create_future()
        self._waiting[entry] = turn
        if gone is not None:
            self._drop(gone, wait)
        self._note(capacity, now)
        try:
            # It may turn out to wait longer than was expected.
            async with asyncio.timeout(latest):
                await turn.place
        except BaseException as left:
            self._queue.remove(entry)
            self._waiting.pop(entry, None)
            self._end(turn, None)
            waits.saw(seconds_of(ahead, self._per_second(capacity)), self._now() - turn.came, whole=False)
            if isinstance(left, TimeoutError):
                waited = self._now() - turn.came
                raise self._refusal("late", _turned_late(waited, remaining), waited) from None
            raise
        # By the rate that is known now: what is learned here is the order, and not the rate once more.
        waits.saw(seconds_of(ahead, self._per_second(capacity)), self._now() - turn.came)

    def leave(self, turn: Turn, end: Finished | TarsError | None) -> None:
        """The engine has nothing more to do for it (again and again)."""
        self._end(turn, end)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _fits(self, room: float, capacity: Capacity) -> bool:
        running = len(self._running)
        # A call of many answers does not wait until the slots for all of them are idle: nothing else is let in before they have theirs.
        needed = min(room, capacity.full / 2) if capacity.generates else room
        return not running or (self._room + max(1.0, needed) <= capacity.room and running < capacity.most_calls)

    def _start(self, turn: Turn, now: float) -> None:
        self._passed += 1
        self._running.add(turn)
        self._room += turn.room
        turn.start = self._rate.started(now)
        if turn.entry is not None:
            turn.shared = self._shared(turn.entry.units)

    def _shared(self, units: float) -> float:
        """Units that are worked off while a call's own are, beside those that run."""
        return units * max(1, len(self._running))

    def _per_second(self, capacity: Capacity) -> float | None:
        return self._rate.per_second(capacity.own_word)

    def _end(self, turn: Turn, end: Finished | TarsError | None) -> None:
        if turn not in self._running:
            return
        now = self._now()
        self._running.remove(turn)
        self._room = self._room - turn.room if self._running else 0.0
        assert turn.start is not None
        assert turn.entry is not None
        expected = turn.entry.units
        units = self._costs.real(turn.work, end, expected=expected, room=turn.room, tokens=turn.tokens)
        self._rate.ended(turn.start, units, now)
        if (capacity := self._capacity()) is not None:
            seconds = seconds_of(turn.shared, self._per_second(capacity))
            self._margin.saw(seconds, now - turn.start.at, whole=isinstance(end, Finished))
        # Who breaks its calls off pays for the place that they had.
        paid = units if isinstance(end, Finished) else max(units, expected * LEFT_PART)
        self._queue.charge(turn.entry.caller, turn.entry.priority, paid - expected)
        self._fill()

    def _fill(self) -> None:
        """Let in what now has room; all, where the worker takes nothing."""
        capacity, now = self._capacity(), self._now()
        while (first := self._queue.first()) is not None:
            turn = self._waiting[first]
            if capacity is not None:
                if not self._fits(turn.room, capacity):
                    break
                self._start(turn, now)
            self._queue.take()
            del self._waiting[first]
            assert turn.place is not None
            if not turn.place.done():
                turn.place.set_result(None)
        self._note(capacity, now)

    def _note(self, capacity: Capacity | None, now: float) -> None:
        saturated = capacity is not None and (bool(self._queue) or self._room >= capacity.full)
        self._rate.note(len(self._running), saturated, now)

    def _drop(self, gone: Entry, wait: float) -> None:
        turn = self._waiting.pop(gone)
        assert turn.place is not None
        if not turn.place.done():
            turn.place.set_exception(self._refusal("dropped", _dropped(len(self._queue)), wait / 2))

    def _refusal(self, why: str, message: str, seconds: float) -> Overloaded:
        """`seconds`: until it would have been taken."""
        self._refused[why] += 1
        wait = max(RETRY_LEAST_SECONDS, seconds) * (1 + JITTER * self._rng.random())
        return Overloaded(
            message,
            retry_after_ms=int(min(RETRY_MOST_SECONDS, wait) * 1000),
            details={"limit": self._queue.most, "queued": len(self._queue), "reason": why},
        )

    def _ahead(self, caller: str, priority: Priority, room: float, capacity: Capacity) -> float:
        """Units that are worked off until a call that comes now is begun."""
        if not self._queue and self._fits(room, capacity):
            return 0.0
        running = sum(turn.entry.units for turn in self._running if turn.entry is not None) * LEFT_PART
        before = self._queue.units_before(caller, priority)
        return units_ahead(before, running, len(self._running))


class Turn:
    """One call at the gate. Enter it once."""

    __slots__ = ("_gate", "begun", "call", "came", "entry", "place", "room", "shared", "start", "tokens", "work")

    def __init__(self, gate: Gate, call: CallContext, work: Work, begun: bool) -> None:
        self._gate = gate
        self.call = call
        self.work = work
        self.begun = begun
        self.entry: Entry | None = None
        self.place: asyncio.Future[None] | None = None
        self.start: Start | None = None
        self.room = 0.0
        self.came = 0.0
        self.shared = 0.0
        """Units that were expected to be worked off while it ran."""
        self.tokens = 0.0
        """Generated so far."""

    async def __aenter__(self) -> Turn:
        await self._gate.enter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gate.leave(self, None)

    def ended(self, end: Finished | TarsError | None) -> None:
        """The engine is done with it, whether or not its caller has read everything; None where it was cancelled."""
        self._gate.leave(self, end)


def _too_late(wait: float, own: float, remaining: float, queued: int) -> str:
    return (
        f"The call would wait about {wait:.1f} s for this replica ({queued} calls wait already) and may take {own:.1f} s beside the "
        f"others, too long for the {remaining:.1f} s that it has left, so it was not begun. Send it again later, to another node, or with "
        "more time (`_meta.timeout_ms`)."
    )


def _turned_late(waited: float, remaining: float) -> str:
    return (
        f"The call waited {waited:.1f} s for this replica, of the {remaining:.1f} s that it had, and was not begun: what is left is too "
        "little for its answer. Send it again later, to another node, or with more time (`_meta.timeout_ms`)."
    )


def _full(queued: int) -> str:
    return f"{queued} calls wait for this replica already, which is its bound. Try again in a moment."


def _dropped(queued: int) -> str:
    return (
        f"{queued} calls wait for this replica, which is its bound, and this one had to go for a caller who has fewer of them, or for "
        "an interactive call. It was not begun. Send it again in a moment, and fewer at once."
    )
