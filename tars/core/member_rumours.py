"""News about members that are still to be told, each O(log n) times, the least told first.

Law of this file: pure; it knows nothing of who is told. Source: SWIM, section 4.1; the factor is memberlist's `RetransmitMult`.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
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
        self._by_told: list[dict[NodeId, Update]] = []
        """How often it was told -> what, whoever waits longest first: when 1,000 nodes start, each packet chooses from as many."""
        self._told: dict[NodeId, int] = {}

    def __len__(self) -> int:
        return len(self._told)

    def add(self, update: Update) -> None:
        """Tell this from now on."""
        self.forget(update.node)
        self._put(update, 0)

    def forget(self, node: NodeId) -> None:
        """Say nothing about `node` any more."""
        if (told := self._told.pop(node, None)) is not None:
            del self._by_told[told][node]

    def take(self, most: int, peers: int, without: Collection[NodeId] = ()) -> list[Update]:
        """Up to `most` pieces for one packet, not about the nodes in `without`; each counts as told."""
        if not self._told:
            return []
        open_ones = (update for level in self._by_told for node, update in level.items() if node not in without)
        chosen = list(islice(open_ones, most))
        last = tellings(peers)
        for update in chosen:
            told = self._told[update.node] + 1
            self.forget(update.node)
            if told < last:
                self._put(update, told)
        return chosen

    def _put(self, update: Update, told: int) -> None:
        while len(self._by_told) <= told:
            self._by_told.append({})
        self._by_told[told][update.node] = update
        self._told[update.node] = told
