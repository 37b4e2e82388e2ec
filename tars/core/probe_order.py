"""Whom to probe next, and who may help.

Law of this file: pure, dice passed in. Every second probe goes round all peers in shuffled order (SWIM, section 4.3: each is probed within
2n - 1 probes); those between go to the next peer in the ring of ids. With the round alone a dead node of a big mesh waits for its first
probe as long as an exponential variable: 4.6 intervals at the 99th percentile. Its neighbour in the ring comes every second interval.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, MutableSequence, Sequence
from typing import Any, Protocol, TypeVar

from tars.core.types import NodeId

_T = TypeVar("_T")

MOST_STEPS = 8
"""Suspects that are passed over in the ring: more at once is a partition, and then no neighbour is the right one."""


class Dice(Protocol):
    """The randomness that is passed in; `random.Random` is one."""

    def random(self) -> float:
        """In [0, 1)."""

    def randrange(self, start: int, /) -> int:
        """In [0, start)."""

    def sample(self, population: Sequence[_T], k: int) -> list[_T]:
        """`k` different elements."""

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """In place."""


class ProbeOrder:
    """The peers that are probed: all that are not held for dead or gone."""

    def __init__(self, node: NodeId, dice: Dice):
        self._node = node
        self._dice = dice
        self._ring: list[NodeId] = []
        self._round: list[NodeId] = []
        self._turn = 0

    def __len__(self) -> int:
        return len(self._ring)

    def __contains__(self, node: object) -> bool:
        if not isinstance(node, str):
            return False
        at = bisect_left(self._ring, node)
        return at < len(self._ring) and self._ring[at] == node

    def add(self, node: NodeId) -> None:
        """Probe it too, in this round already."""
        if node in self:
            return
        self._ring.insert(bisect_left(self._ring, node), node)
        self._round.insert(self._dice.randrange(len(self._round) + 1), node)

    def remove(self, node: NodeId) -> None:
        """Probe it no longer."""
        if node in self:
            del self._ring[bisect_left(self._ring, node)]

    def next(self, is_suspect: Callable[[NodeId], bool]) -> NodeId | None:
        """The next one to probe; None where there is nobody. In the ring suspects are passed over: they are looked after already."""
        if not self._ring:
            return None
        self._turn += 1
        if self._turn % 2:
            at = bisect_right(self._ring, self._node)
            for step in range(min(MOST_STEPS, len(self._ring))):
                node = self._ring[(at + step) % len(self._ring)]
                if not is_suspect(node):
                    return node
        while True:
            while self._round:
                node = self._round.pop()
                if node in self:
                    return node
            self._round = list(self._ring)
            self._dice.shuffle(self._round)

    def sample(self, most: int, without: Collection[NodeId] = ()) -> list[NodeId]:
        """Up to `most` different peers at random."""
        drawn = self._dice.sample(self._ring, min(len(self._ring), most + len(without)))
        return [node for node in drawn if node not in without][:most]
