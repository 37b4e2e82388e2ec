"""What is due when, for machines that get the time as an argument.

Law of this file: no clock. Timers that are due at the same moment fire in the order in which they were set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Timer:
    """One thing to do. `due` may be moved later at any time; `cancelled` ones never fire."""

    due: float
    call: Callable[[float], None]
    """Called with the time that it is, which may be later than `due`."""
    cancelled: bool = False


class Timers:
    """A heap in which a timer that was moved later is found where it was and put back where it belongs."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._set = 0

    def at(self, due: float, call: Callable[[float], None]) -> Timer:
        """Call it once, when `due` has come. Never give a time that is past: who looks at `next_due` would take itself for late."""
        timer = Timer(due, call)
        self._push(timer)
        return timer

    def next_due(self) -> float:
        """When the first one is due; infinity when there is none."""
        while self._heap:
            due, _, timer = self._heap[0]
            if not timer.cancelled and timer.due <= due:
                return due
            heappop(self._heap)
            if not timer.cancelled:
                self._push(timer)
        return NEVER

    def run(self, now: float) -> None:
        """Fire all that is due. What they set for `now` or earlier fires too."""
        while self.next_due() <= now:
            heappop(self._heap)[2].call(now)

    def _push(self, timer: Timer) -> None:
        self._set += 1
        heappush(self._heap, (timer.due, self._set, timer))
