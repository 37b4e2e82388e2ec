"""One call in flight, seen from the node: what came for it and who waits for it.

Law of this file: it keeps and hands out; the pipe and the worker's life are not known here. One event loop, no lock.

The worker goes on while a caller reads slowly, so what waits here is bounded by the answer's own length: more than `BACKLOG_MOST` waiting
deltas are joined into one for each answer, with the same text, tokens and log probabilities.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from tars.errors import DeadlineExceeded, TarsError
from tars.workers.engine import Event, Finished, Work
from tars.workers.protocol import Row, delta_of

BACKLOG_MOST = 256
"""Deltas that wait one by one. A reader who is 256 tokens behind (seconds) cannot tell a token's own arrival any more."""


class CallHandle:
    """Given to `ReplicaWorker.run`, it names that call for `ReplicaWorker.save` while it runs. For one call only."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number: int | None = None


OnEnd = Callable[[Finished | TarsError | None], None]
"""Told once that the engine has nothing more to do for a call, whether or not its caller has read everything: its end, None where it was
cancelled."""


class Call:
    """Its events, until one of them ends it. Made in a running event loop; `seconds` is its time budget."""

    __slots__ = ("_end", "_on_end", "_rows", "_timer", "_waiter", "open", "started", "width", "work")

    def __init__(self, work: Work, seconds: float, width: int, on_end: OnEnd | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.work = work
        self.width = width
        """Slots that it takes where they are free: its answers; 0 for what needs none."""
        self.started = loop.time()
        self.open = True
        """False once the worker itself ended the call: there is nothing to cancel any more."""
        self._rows: deque[Row] = deque()
        self._end: Finished | TarsError | None = None
        self._on_end = on_end
        self._waiter: asyncio.Future[None] | None = None
        # One timer a call; a time-out around each of its events cost more than all the rest of them.
        self._timer = loop.call_later(seconds, self._expire)

    def add(self, row: Row) -> None:
        """Take a delta."""
        if len(self._rows) >= BACKLOG_MOST:
            self._rows = deque(_joined(self._rows))
        self._rows.append(row)
        self._wake()

    def finish(self, end: Finished | TarsError) -> None:
        """Take the worker's answer; what waits is handed out before it."""
        self.open = False
        self._ended(end)

    def fail(self, error: TarsError) -> None:
        """End it from this side."""
        self._ended(error)

    def close(self) -> None:
        """Nobody reads any longer."""
        self._timer.cancel()
        self._tell(None)

    async def next(self) -> Event | TarsError:
        """The next delta, or the end (again and again)."""
        while not self._rows:
            if self._end is not None:
                return self._end
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return delta_of(self._rows.popleft())

    def _expire(self) -> None:
        self._ended(too_late())

    def _ended(self, end: Finished | TarsError) -> None:
        if self._end is None:
            self._end = end
            self._timer.cancel()
            self._wake()
            self._tell(end)

    def _tell(self, end: Finished | TarsError | None) -> None:
        if self._on_end is not None:
            told, self._on_end = self._on_end, None
            told(end)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def too_late() -> DeadlineExceeded:
    """What a call gets whose time is over."""
    return DeadlineExceeded("The call's time budget is used up; the work was stopped. Give it a larger `timeout_ms`.")


def _joined(rows: deque[Row]) -> list[Row]:
    """The same in one row for each of the call's answers."""
    by_index: dict[int, list[Row]] = {}
    for row in rows:
        by_index.setdefault(row[1], []).append(row)
    joined: list[Row] = []
    for index, parts in by_index.items():
        text = "".join(part[2] for part in parts)
        token_ids = [token for part in parts for token in part[3]]
        row = [parts[0][0], index, text, token_ids]
        further: list[dict[str, Any]] = [part[4] for part in parts if len(part) > 4]
        if further:
            logprobs = [one for more in further for one in more["logprobs"] or ()]
            row.append(
                {
                    "logprobs": logprobs if any(more["logprobs"] is not None for more in further) else None,
                    "reasoning": "".join(more["reasoning"] for more in further),
                    "tool_calls": [one for more in further for one in more["tool_calls"]],
                    "ended": any(more["ended"] for more in further),
                }
            )
        joined.append(row)
    return joined
