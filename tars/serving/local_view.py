"""This node as it is now, in people's words: its devices and replicas, and what nodes and devices are called.

Law of this file: it reads and describes, and changes nothing. Reading the devices asks their drivers, so all who ask within a second share
one reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tars.core.replicated_map import adverts
from tars.core.types import NodeId, NodeSnapshot
from tars.mesh.coordinator import Coordinator, FileFetch, LiveReplica
from tars.messages.node import ReplicaDescription
from tars.serving.call_explaining import Names
from tars.serving.gate import Gate
from tars.serving.local_fleet import LocalFleet
from tars.serving.mesh_overview import device_names

SNAPSHOT_SECONDS = 1.0
"""Devices are read at most so often: watchers of the status page share one reading."""


class LocalView:
    """See the module's law. `name`: what people call this node; `now` is the monotonic clock."""

    def __init__(self, coordinator: Coordinator, fleet: LocalFleet, name: str, now: Callable[[], float]):
        self._coordinator = coordinator
        self._fleet = fleet
        self._name = name
        self._now = now
        self._snapshot: tuple[float, int, NodeSnapshot] | None = None
        self._probing = asyncio.Lock()

    async def snapshot(self) -> NodeSnapshot:
        """This node with its devices, at most `SNAPSHOT_SECONDS` old and never older than the last change of its replicas."""
        async with self._probing:  # those who ask meanwhile share the answer, however slow the driver is
            now, changes = self._now(), self._coordinator.changes
            known = self._snapshot
            if known is not None and now - known[0] <= SNAPSHOT_SECONDS and known[1] == changes:
                return known[2]
            snapshot = await self._coordinator.snapshot()
            self._snapshot = (now, changes, snapshot)
            return snapshot

    async def nodes(self) -> list[NodeSnapshot]:
        """Every live node; this one as it is now, the others as they told last."""
        own = await self.snapshot()
        return [own, *(node for node in self._coordinator.nodes() if node.id != own.id)]

    def names(self) -> Names:
        """What people call nodes, and the devices of replicas."""
        coordinator = self._coordinator
        told = adverts(coordinator.records.map)
        nodes = {node: advert.node.name for node, advert in told.items()} | {NodeId(coordinator.node_id): self._name}
        devices = device_names(told.values())
        devices |= {replica: live.device.name for replica, live in coordinator.replicas.items()}
        devices |= {replica: fetch.device.name for replica, fetch in coordinator.fetches.items()}
        return Names(nodes, devices)

    def replicas(self) -> list[ReplicaDescription]:
        """This node's own, then those whose file is still coming."""
        return [
            *(
                _describe_replica(live, self._fleet.gate(replica, live.worker))
                for replica, live in self._coordinator.replicas.items()
            ),
            *(_describe_fetch(fetch) for fetch in self._coordinator.fetches.values()),
        ]


def _describe_fetch(fetch: FileFetch) -> ReplicaDescription:
    assignment = fetch.assignment
    return ReplicaDescription(
        id=assignment.replica,
        model=assignment.model,
        model_kind=fetch.kind.value,
        variant=assignment.variant,
        device=assignment.device,
        device_name=fetch.device.name,
        simulated=fetch.device.simulated,
        state=fetch.state.value,
        progress=fetch.progress,
        estimated_bytes=int(assignment.memory.total),
        info=None,
        restarts=0,
        active_calls=0,
        queued_calls=0,
        calls_total=0,
        last_error=None if fetch.error is None else fetch.error.message,
        reason=assignment.reason,
    )


def _describe_replica(live: LiveReplica, gate: Gate) -> ReplicaDescription:
    worker, assignment = live.worker, live.assignment
    return ReplicaDescription(
        id=assignment.replica,
        model=assignment.model,
        model_kind=live.kind.value,
        variant=assignment.variant,
        device=assignment.device,
        device_name=live.device.name,
        simulated=live.device.simulated,
        state=worker.state.value,
        progress=worker.progress,
        estimated_bytes=int(assignment.memory.total),
        info=worker.info,
        restarts=worker.restarts,
        active_calls=worker.active_calls,
        queued_calls=worker.queued_calls + gate.waiting,
        calls_total=worker.calls_total,
        counters=worker.counters,
        waiting=gate.describe(),
        last_error=worker.last_error.message if worker.last_error else None,
        reason=assignment.reason,
    )
