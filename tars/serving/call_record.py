"""What became of this node's last calls, for `calls.explain`: which replicas were asked and why, how each ended, what was waited for.

Law of this file: ids, names, times and outcomes; never a call's text nor an answer's. A record is filled while its call runs, so that a
call that hangs can be explained too. Making one costs a call some microseconds: words are made when somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tars.core.call_effects import AttemptRecord
from tars.errors import TarsError
from tars.messages.base import CallContext

KEEP_CALLS = 1000
"""Some minutes of a busy node, days of a quiet one; a record is some KiB."""

RUNNING = "running"
ANSWERED = "answered"
REPEATED = "repeated"
"""Answered with what an earlier call under the same idempotency key got."""
CANCELLED = "cancelled"


@dataclass(slots=True)
class Wait:
    """A stretch of time in which no replica worked on the call. Times are monotonic, in seconds."""

    what: str
    """`load`, `backoff`, `replica`, `idempotency_key`..."""
    started: float
    ended: float | None = None


class CallRecord:
    """One call. The router sets `attempts` once, to the list that its machine fills."""

    __slots__ = (
        "_context",
        "_now",
        "at",
        "attempts",
        "caller",
        "ended",
        "error",
        "face",
        "forwarded_by",
        "id",
        "method",
        "model",
        "outcome",
        "repeats",
        "started",
        "waits",
    )

    def __init__(self, call: CallContext, model: str, now: Callable[[], float], at: float):
        self.id = call.trace_id
        self.method = call.method
        self.model = model
        self.caller = call.caller
        self.face = call.face
        self.forwarded_by = call.peer if call.hops else None
        """The NodeId of the gateway, where a peer sent the call: its record tells the whole of it."""
        self.at = at
        """Unix seconds, for people."""
        self.started = now()
        """Monotonic, as the attempts' times."""
        self.ended: float | None = None
        self.outcome = RUNNING
        """`answered`, `repeated`, `cancelled`, or the kind of the error that the caller got."""
        self.error = ""
        """Its message."""
        self.attempts: Sequence[AttemptRecord] = ()
        self.waits: list[Wait] = []
        self.repeats = ""
        """The id of the call whose answer it got (`repeated`)."""
        self._now = now
        self._context: CallContext | None = call

    def is_of(self, call: CallContext) -> bool:
        """Whether this is the record of that very call, which still runs."""
        return self._context is call

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While the call waits for something: see `Wait.what`."""
        wait = Wait(what, self._now())
        self.waits.append(wait)
        try:
            yield
        finally:
            wait.ended = self._now()

    def answered(self, outcome: str = ANSWERED, of: str = "") -> None:
        """Before the answer is handed on: whoever has it may ask at once. `of`: the call that it was computed for, where not this one."""
        self.repeats = of
        self._end(outcome, "")

    def failed(self, error: TarsError) -> None:
        """With what the caller is told."""
        self._end(error.kind, error.message)

    def left(self) -> None:
        """The caller went away, unless the call had ended."""
        self._end(CANCELLED, "")

    def _end(self, outcome: str, error: str) -> None:
        if self.ended is None:
            self._context = None
            self.ended, self.outcome, self.error = self._now(), outcome, error


class CallRecords:
    """One per node. `now` is the monotonic clock, `wall_clock` Unix seconds."""

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        keep: int = KEEP_CALLS,
    ):
        self._now = now
        self._wall_clock = wall_clock
        self._keep = keep
        self._kept: deque[CallRecord] = deque()
        self._by_id: dict[str, list[CallRecord]] = {}

    def open(self, call: CallContext, model: str) -> CallRecord:
        """A record of a call that begins now; the oldest one goes. Of one that has begun: its own."""
        for known in self._by_id.get(call.trace_id, ()):
            if known.is_of(call):
                return known
        record = CallRecord(call, model, self._now, self._wall_clock())
        self._kept.append(record)
        self._by_id.setdefault(record.id, []).append(record)
        if len(self._kept) > self._keep:
            oldest = self._kept.popleft()
            left = self._by_id[oldest.id]
            left.remove(oldest)
            if not left:
                del self._by_id[oldest.id]
        return record

    def find(self, trace_id: str) -> Sequence[CallRecord]:
        """Those of a trace, the oldest first: callers may put several calls into one."""
        return tuple(self._by_id.get(trace_id, ()))

    def __len__(self) -> int:
        return len(self._kept)
