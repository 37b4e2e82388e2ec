"""Counts of calls and the last errors, for `node.describe` and the status page.

Law of this file: it counts what it is told; no content of a call is kept.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable

from tars.errors import Cancelled, TarsError
from tars.messages.node import CallCounters, RecentError

KEEP_ERRORS = 50
"""As many as a person reads on a status page."""
WORK = "inference."
"""Methods that put a model to work. Only these are 'running': a node that counted `node.describe` and `node.drain` themselves would never
be seen at rest by whoever asks it with them."""


class CallLog:
    """`wall_clock` gives Unix seconds, for people."""

    def __init__(self, wall_clock: Callable[[], float]):
        self._wall_clock = wall_clock
        self._by_method: Counter[str] = Counter()
        self._unfinished = 0
        self._active = 0
        self._failed = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._errors: deque[RecentError] = deque(maxlen=KEEP_ERRORS)

    @property
    def active(self) -> int:
        """Inference calls between their start and their end now."""
        return self._active

    def started(self, method: str) -> None:
        """Count a call."""
        self._by_method[method] += 1
        self._unfinished += 1
        self._active += method.startswith(WORK)
        self._idle.clear()

    def ended(self, method: str, error: TarsError | None, trace_id: str) -> None:
        """Count its end, and keep its error; a caller who went away, or pressed Stop, met no error."""
        self._unfinished -= 1
        self._active -= method.startswith(WORK)
        if not self._unfinished:
            self._idle.set()
        if error is None or isinstance(error, Cancelled):
            return
        self._failed += 1
        self._errors.append(
            RecentError(
                at=self._wall_clock(), method=method, error_kind=error.kind, message=error.message, trace_id=trace_id
            )
        )

    async def idle(self) -> None:
        """Wait until no call runs, of any method."""
        await self._idle.wait()

    def counters(self) -> CallCounters:
        """Since the node started."""
        return CallCounters(
            total=self._by_method.total(), failed=self._failed, active=self._active, by_method=dict(self._by_method)
        )

    def recent_errors(self) -> list[RecentError]:
        """Newest first."""
        return list(reversed(self._errors))
