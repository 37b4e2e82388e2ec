"""All calls that one worker has, seen from the node: their numbers, which of them find a slot, and how many may wait for one.

Law of this file: it counts; the pipe and the worker's life are not known here. One event loop, no lock.

The node alone gives this worker work, so counting here is exact and newer than the worker's last word.
"""

from __future__ import annotations

import asyncio

from tars.errors import Overloaded
from tars.workers.calls import Call, OnEnd
from tars.workers.engine import Work


class CallsInFlight:
    """Calls by their numbers, in the order they came; numbers count on and are never reused."""

    def __init__(self, first_number: int) -> None:
        self.total = 0
        """Calls that were ever taken."""
        self.next_number = first_number
        self._calls: dict[int, Call] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._seconds_per_call = 1.0

    def __len__(self) -> int:
        return len(self._calls)

    def served(self, slots: int) -> int:
        """Calls, in their order, that find one of `slots` free; a call of several answers takes as many as it has."""
        taken = served = 0
        for call in self._calls.values():
            if taken < slots or not call.width:
                served += 1
                taken += call.width
        return served

    def refuse_beyond(self, limit: int, slots: int) -> None:
        """Raise `Overloaded` where every slot is taken and `limit` calls wait for one already."""
        queued = len(self._calls) - self.served(slots)
        if queued < limit or sum(call.width for call in self._calls.values()) < slots:
            return
        raise Overloaded(
            f"{queued} calls wait for this replica already, which is its bound. Try again in a moment.",
            # By then about half of the queue is served: a newcomer finds room, and not everybody comes back at once.
            retry_after_ms=int(min(60.0, max(0.2, self._seconds_per_call * queued / (2 * slots))) * 1000),
            details={"limit": limit, "queued": queued},
        )

    def add(self, work: Work, seconds: float, width: int, on_end: OnEnd | None) -> tuple[int, Call]:
        """Take a call under the next number; the rest as in `Call`."""
        number = self.next_number
        self.next_number += 1
        self.total += 1
        call = self._calls[number] = Call(work, seconds, width, on_end)
        self._idle.clear()
        return number, call

    def get(self, number: int | None) -> Call | None:
        """The call of that number, while it is in flight."""
        return None if number is None else self._calls.get(number)

    def remove(self, number: int) -> Call | None:
        """The call of that number counts no longer; None where it did not."""
        call = self._calls.pop(number, None)
        if not self._calls:
            self._idle.set()
        return call

    def remove_all(self) -> dict[int, Call]:
        """None counts any longer; those that did."""
        calls, self._calls = self._calls, {}
        self._idle.set()
        return calls

    def lasted(self, seconds: float) -> None:
        """A call was over after so long."""
        # A moving average over about ten calls: what `Overloaded` tells callers to wait.
        self._seconds_per_call += 0.1 * (seconds - self._seconds_per_call)

    async def wait_until_idle(self) -> None:
        """Until no call is in flight."""
        await self._idle.wait()
