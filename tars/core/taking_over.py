"""From when on a node that coordinates gives orders: once it has had the time to know the others.

Law of this file: pure; it is told who coordinates, and what is ordered is `coordination`'s.
"""

from __future__ import annotations

from tars.core.mesh_events import MeshView
from tars.core.types import NodeId

TAKE_OVER_SECONDS = 1.0
"""A node coordinates for so long before it gives its first orders: the others' adverts arrive meanwhile."""
ISOLATED_SECONDS = 5.0
"""One that lost sight of everybody at once decides nothing for so long: most likely it is its own cable, and the others run on."""


class TakingOver:
    """One for each node, asked in every round."""

    def __init__(self) -> None:
        self._coordinates_since: float | None = None
        self._isolated_since: float | None = None

    def due(self, view: MeshView, node: NodeId, now: float) -> float | None:
        """From when on `node` gives orders, on the clock of `now`; None: another one coordinates, or nobody."""
        if not view.isolated:
            self._isolated_since = None
        elif self._isolated_since is None:
            self._isolated_since = now
        if view.coordinator != node:
            self._coordinates_since = None
            return None
        if self._coordinates_since is None:
            self._coordinates_since = now
        due = self._coordinates_since + (TAKE_OVER_SECONDS if view.members else 0.0)
        return due if self._isolated_since is None else max(due, self._isolated_since + ISOLATED_SECONDS)
