"""A clock whose stamps never go back, whatever the PC's clock does: the larger of wall time and everything seen, and a counter.

Law of this file: pure; the wall clock is an argument. Source: Kulkarni et al., "Logical Physical Clocks", 2014.
"""

from __future__ import annotations

from tars.core.mesh_messages import Stamp
from tars.core.types import NodeId

MOST_WALL_MS = 2**48 - 1
"""48 bits of milliseconds last until the year 10889."""
MOST_COUNTER = 2**16 - 1
"""Stamps within one millisecond; what comes after takes the next millisecond, so order is kept."""
MOST_AHEAD_MS = 366 * 86_400_000
"""A stamp further ahead than a year is no skewed clock but damage: observing it would drag every node's clock there for good."""


class HybridClock:
    """The clock of one node. `last` is the latest stamp given or seen, kept over restarts by whoever owns the clock."""

    def __init__(self, node: NodeId, last: Stamp | None = None):
        self.node = node
        self._wall_ms = 0 if last is None else last.wall_ms
        self._counter = -1 if last is None else last.counter

    @property
    def last(self) -> Stamp | None:
        """The latest stamp that was given or observed; None before the first. Its node is this one: only its time counts."""
        return None if self._counter < 0 else Stamp(self._wall_ms, self._counter, self.node)

    def tick(self, wall_ms: int) -> Stamp:
        """A stamp later than every one given or observed before. `wall_ms` is Unix time; a clock that was set back does not matter."""
        wall_ms = min(max(0, wall_ms), MOST_WALL_MS)
        if wall_ms > self._wall_ms:
            self._wall_ms, self._counter = wall_ms, 0
        elif self._counter < MOST_COUNTER:
            self._counter += 1
        else:
            self._wall_ms, self._counter = self._wall_ms + 1, 0
        return Stamp(self._wall_ms, self._counter, self.node)

    def observe(self, stamp: Stamp) -> None:
        """From now on every tick is later than `stamp`. Ask `why_damaged` first of a stamp that came from outside."""
        if (stamp.wall_ms, stamp.counter) > (self._wall_ms, self._counter):
            self._wall_ms, self._counter = stamp.wall_ms, stamp.counter

    def why_damaged(self, stamp: Stamp, wall_ms: int) -> str | None:
        """Why a stamp cannot be a clock's, as a sentence; None where it can.

        It is held against the larger of wall time and what was seen so far, so that a PC whose battery-less clock says 1970 after a
        start can still talk with its peers.
        """
        if not (0 <= stamp.wall_ms <= MOST_WALL_MS and 0 <= stamp.counter <= MOST_COUNTER):
            return f"the stamp ({stamp.wall_ms} ms, {stamp.counter}) of node {stamp.node} is outside what a clock gives"
        ahead = stamp.wall_ms - max(wall_ms, self._wall_ms)
        if ahead > MOST_AHEAD_MS:
            return (
                f"the stamp of node {stamp.node} is {ahead // 86_400_000} days ahead of this PC's clock, so one of the two is wrong; "
                "set the clocks of both PCs"
            )
        return None
