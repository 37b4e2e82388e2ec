"""One node's part in the mesh as one pure machine: who is there (`membership`), what all know (`replicated_map`), and the news between them.

Law of this file: `handle(event, now, wall_ms) -> effects`, the same for the driver (`mesh.gossip`) and for the simulation; no I/O, no clock,
dice passed in. An envelope may be lost, doubled, late; nothing here relies on its arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tars.core.membership import Dice, MembershipSettings
from tars.core.mesh_events import Effect, Event, MeshView
from tars.core.replicated_map import ReplicatedMap
from tars.core.types import NodeId


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """How the machine behaves. The defaults are for 2 to 1,000 PCs on LANs and tailnets."""

    membership: MembershipSettings = field(default_factory=MembershipSettings)
    addresses: tuple[str, ...] = ()
    """Where peers reach this node, `host:port`, best first."""


class MeshMachine:
    """`records` is this node's copy of the map, shared with whoever reads and writes it; after a write tell `Changed`."""

    def __init__(self, node: NodeId, records: ReplicatedMap, settings: MeshSettings, dice: Dice):
        self.node = node
        self.records = records

    def handle(self, event: Event, now: float, wall_ms: int) -> list[Effect]:
        """What is to be done about `event`. `now`: seconds on a clock that never goes back; `wall_ms`: Unix time, may be wrong."""
        raise NotImplementedError

    def next_due(self, now: float) -> float:
        """When `Tick` is due next, on the clock of `now`; at once before the first event."""
        raise NotImplementedError

    def view(self) -> MeshView:
        """How this node sees the mesh; the same object until something in it changes."""
        raise NotImplementedError
