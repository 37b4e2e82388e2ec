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
        self._now = now

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While the call waits for something: see `Wait.what`."""
        wait = Wait(what, self._now())
        self.waits.append(wait)
        try:
            yield
        finally:
            wait.ended = self._now()

    def answered(self, outcome: str = ANSWERED) -> None:
        """Before the answer is handed on: whoever has it may ask at once."""
        self._end(outcome, "")

    def failed(self, error: TarsError) -> None:
        """With what the caller is told."""
        self._end(error.kind, error.message)

    def left(self) -> None:
        """The caller went away, unless the call had ended."""
        self._end(CANCELLED, "")

    def _end(self, outcome: str, error: str) -> None:
        if self.ended is None:
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
        """A record of a call that begins now; the oldest one goes."""
        record = CallRecord(call, model, self._now, self._wall_clock())
        self._kept.append(record)
        self._by_id.setdefault(record.id, []).append(record)
        if len(self._kept) > self._keep:
            oldest = self._kept.popleft()
            known = self._by_id[oldest.id]
            known.remove(oldest)
            if not known:
                del self._by_id[oldest.id]
        return record

    def refused(self, call: CallContext, model: str, error: TarsError) -> None:
        """A call that ended before any replica was looked for."""
        self.open(call, model).failed(error)

    def find(self, trace_id: str) -> Sequence[CallRecord]:
        """Those of a trace, the oldest first: callers may put several calls into one."""
        return tuple(self._by_id.get(trace_id, ()))

    def __len__(self) -> int:
        return len(self._kept)
