"""Who coordinates, of those whom a node sees.

Law of this file: pure, and without memory: nobody is elected and nothing is agreed, nodes that see the same say the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tars.core.types import NodeId


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could coordinate."""

    node: NodeId
    priority: int = 0
    draining: bool = False


def turn_of(candidate: Candidate) -> tuple[bool, int, NodeId]:
    """Whose is smaller comes first."""
    return (candidate.draining, -candidate.priority, candidate.node)


def coordinator_of(candidates: Iterable[Candidate]) -> NodeId | None:
    """The first by (highest priority, NodeId); one that drains only where nobody else is left. Nodes that see the same say the same."""
    first = min(candidates, key=turn_of, default=None)
    return None if first is None else first.node
