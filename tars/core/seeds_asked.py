"""Addresses at which somebody may be, and who answered there.

Law of this file: pure bookkeeping; when to ask is `membership`'s. A seed at which a live member answered is left alone until
that one is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from tars.core.types import NodeId

MOST_SEEDS = 64
MOST_QUESTIONS = 128
"""Asked and not answered yet; older ones are forgotten."""


class SeedsAsked:
    """The seeds of one node, in the order in which their turn comes."""

    def __init__(self) -> None:
        self._seeds: dict[str, NodeId | None] = {}
        self._questions: dict[int, str] = {}

    def add(self, address: str) -> bool:
        """Remember it; False where it is known already. Of too many the one whose turn comes first goes."""
        if address in self._seeds:
            return False
        if len(self._seeds) >= MOST_SEEDS:
            del self._seeds[next(iter(self._seeds))]
        self._seeds[address] = None
        return True

    def next(self, is_there: Callable[[NodeId], bool]) -> str | None:
        """The next one at which nobody is known to be there; its turn comes again after the others'."""
        for address, node in self._seeds.items():
            if node is None or not is_there(node):
                self._seeds[address] = self._seeds.pop(address)
                return address
        return None

    def asked(self, number: int, address: str) -> None:
        """The question with this number went there."""
        if len(self._questions) >= MOST_QUESTIONS:
            del self._questions[next(iter(self._questions))]
        self._questions[number] = address

    def was_asked(self, number: int) -> bool:
        """Whether an answer with this number answers a seed's question."""
        return number in self._questions

    def answered(self, number: int, node: NodeId) -> str | None:
        """Where `node` was found, if this answers a question."""
        address = self._questions.pop(number, None)
        if address in self._seeds:
            self._seeds[address] = node
        return address

    def unanswered(self, number: int) -> None:
        """Nobody is there."""
        self._questions.pop(number, None)
