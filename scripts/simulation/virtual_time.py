"""Virtual time: a heap of what will happen; nothing ever waits, and what is due at the same moment happens in the order it was asked for.

Law of this file: no wall clock, no thread, no asyncio. Same calls, same order, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], None]


class VirtualTime:
    """`now` is in seconds since the simulation began."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        """Actions that happened."""
        self._heap: list[tuple[float, int, Action]] = []
        self._asked = 0

    def at(self, when: float, action: Action) -> None:
        """Do `action` at `when`, or now where that has passed. What is no longer wanted must see that itself."""
        self._asked += 1
        heappush(self._heap, (max(when, self.now), self._asked, action))

    def after(self, seconds: float, action: Action) -> None:
        """Do `action` in so many seconds."""
        self.at(self.now + seconds, action)

    def run_until(self, end: float) -> None:
        """Let everything happen that is due until `end`; then it is `end`."""
        heap = self._heap
        while heap and heap[0][0] <= end:
            self.now, _, action = heappop(heap)
            self.steps += 1
            action()
        self.now = end
