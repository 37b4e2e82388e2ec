"""What one node knows of another.

Law of this file: one peer's fields and what follows from them alone; how they change is `membership`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.core.mesh_messages import MemberState, Update
from tars.core.timers import Timer
from tars.core.types import NodeId

LIVE = frozenset({MemberState.ALIVE, MemberState.SUSPECT, MemberState.DRAINING})
"""States of peers that are probed and told things. A SUSPECT is not yet held for dead."""
OWN = frozenset({MemberState.ALIVE, MemberState.DRAINING, MemberState.LEFT})
"""States that a node claims for itself."""
UNHEARD = -1
"""The incarnation of a peer that nobody has said anything about."""
MOST_ADDRESSES = 16
"""Of one peer, whatever it or others say."""


@dataclass(slots=True)
class Suspicion:
    """Why and since when a peer is suspected."""

    started: float
    """Or when the last sign of life came since."""
    accusers: set[NodeId]
    timer: Timer
    mine: bool = False
    """This node's own probe failed."""
    private: bool = False
    """It follows from a death that was told here out of the blue: nobody is told before this node has seen for itself."""
    check: Timer | None = None
    """When to ask it again."""


@dataclass(slots=True)
class Peer:
    """A peer as this node sees it."""

    node: NodeId
    state: MemberState
    incarnation: int
    since: float
    recorded: tuple[str, ...]
    told: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    heard: float = float("-inf")
    corrected: float = float("-inf")
    behind: bool = False
    """It spoke with a lower incarnation than it had, or with the same and something else: it has forgotten an earlier life, and must be
    told."""
    suspicion: Suspicion | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """What it says of itself, then what its record says, then where a seed found it."""
        return tuple(dict.fromkeys((*self.told, *self.recorded, *self.found)))[:MOST_ADDRESSES]

    @property
    def must_be_told(self) -> bool:
        """Whether it should hear what is held of it, since it may have to refute that."""
        return self.behind or self.state not in OWN or self.state is MemberState.LEFT

    def update(self) -> Update:
        """What there is to tell of it."""
        accuser = min(self.suspicion.accusers, default=None) if self.suspicion is not None else None
        return Update(self.node, max(0, self.incarnation), self.state, self.told, accuser)
