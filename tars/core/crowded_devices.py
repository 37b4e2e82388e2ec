"""Devices on which programs beside TARS took so much since its replicas were loaded that they want more than is left.

Law of this file: pure; the time is told. It counts from the least that such programs held since the device's replicas last changed, so
what was there before them crowds nothing. While something loads or ends on a device, nothing can be told of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.core.coordination_view import Scene
from tars.core.types import Bytes, DeviceId, ReplicaId


@dataclass(slots=True)
class _Foreign:
    """What programs beside TARS held on a device at the least, since its replicas last changed."""

    replicas: frozenset[ReplicaId]
    held: int


class CrowdedDevices:
    """See the module's law. Crowded is where at least `growth` was taken and less than `free` is left."""

    def __init__(self, free: Bytes, growth: Bytes):
        self._free = free
        self._growth = growth
        self._foreign: dict[DeviceId, _Foreign] = {}
        self.since: dict[DeviceId, float] = {}
        """Of each crowded device the time at which that was noted first."""

    def note(self, scene: Scene) -> None:
        """Take in what the nodes report."""
        here: dict[DeviceId, set[ReplicaId]] = {}
        quiet = scene.devices.keys() - scene.in_motion()
        for replica, report in scene.reports.items():
            here.setdefault(report.assignment.device, set()).add(replica)
        for device in scene.devices.values():
            if device.id not in quiet:
                self._foreign.pop(device.id, None)
                continue
            held = device.memory_total - device.memory_free - device.memory_held
            replicas = frozenset(here.get(device.id, ()))
            known = self._foreign.get(device.id)
            if known is None or known.replicas != replicas:
                known = self._foreign[device.id] = _Foreign(replicas, held)
            known.held = min(known.held, held)
            crowded = device.memory_free < self._free and held - known.held >= self._growth
            if crowded and replicas:
                self.since.setdefault(device.id, scene.now)
            else:
                self.since.pop(device.id, None)
        for gone in set(self.since) - quiet:
            del self.since[gone]
