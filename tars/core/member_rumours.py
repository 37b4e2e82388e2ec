"""News about members that are still to be told, each O(log n) times, the least told first.

Law of this file: pure; it knows nothing of who is told. Source: SWIM, section 4.1; the factor is memberlist's `RetransmitMult`.
"""

from __future__ import annotations

from collections.abc import Collection
from heapq import nsmallest
from math import ceil, log10

from tars.core.mesh_messages import Update
from tars.core.types import NodeId

FACTOR = 4
"""Told ceil(4 * log10(n + 1)) times by each of n nodes, every node gets so many copies on average: of 1,000 nodes 13, so that a tenth of
all packets may be lost and one in 10**5 nodes misses it; the probes repair that."""
FEWEST = 3
"""In a mesh of two or three nodes one lost packet must not be the only one."""


def tellings(peers: int) -> int:
    """How often each piece of news is told in a mesh with so many peers."""
    return max(FEWEST, ceil(FACTOR * log10(peers + 1)))


class MemberRumours:
    """At most one piece of news for each node: a newer one takes its place and is told afresh."""

    def __init__(self) -> None:
        self._told: dict[NodeId, tuple[int, Update]] = {}

    def __len__(self) -> int:
        return len(self._told)

    def add(self, update: Update) -> None:
        """Tell this from now on."""
        self._told[update.node] = (0, update)

    def forget(self, node: NodeId) -> None:
        """Say nothing about `node` any more."""
        self._told.pop(node, None)

    def take(self, most: int, peers: int, without: Collection[NodeId] = ()) -> list[Update]:
        """Up to `most` pieces for one packet, not about the nodes in `without`; each counts as told."""
        if not self._told:
            return []
        open_ones = [(told, node) for node, (told, _) in self._told.items() if node not in without]
        chosen = []
        for told, node in nsmallest(most, open_ones) if len(open_ones) > most else open_ones:
            chosen.append(self._told[node][1])
            if told + 1 >= tellings(peers):
                del self._told[node]
            else:
                self._told[node] = (told + 1, self._told[node][1])
        return chosen
