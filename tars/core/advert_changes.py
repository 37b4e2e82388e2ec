"""When a node's advert differs so much from the one that its peers have that they should hear of it.

Law of this file: pure. What decides nothing (temperature, a percent of progress, a window more on the desktop) is told along with the next
thing that does.
"""

from __future__ import annotations

from dataclasses import replace

from tars.core.records import NodeAdvert, ReplicaReport, TransferReport
from tars.core.types import Bytes, DeviceSnapshot

MEMORY_STEP = Bytes.mib(256)
MEMORY_SHARE = 0.02
"""Memory that comes and goes by less than either tells nobody anything: browsers and compositors do that all day."""
PERCENT_STEP = 10.0


def differs(told: NodeAdvert | None, now: NodeAdvert) -> bool:
    """Whether peers that have `told` should get `now`."""
    if told is None:
        return True
    if told == now:  # nearly always, and much cheaper than what follows
        return False
    if replace(told.node, devices=()) != replace(now.node, devices=()) or len(told.node.devices) != len(
        now.node.devices
    ):
        return True
    if any(_device_differs(one, other) for one, other in zip(told.node.devices, now.node.devices, strict=True)):
        return True
    if (told.version, told.files, told.models, told.client_url) != (
        now.version,
        now.files,
        now.models,
        now.client_url,
    ) or len(told.replicas) != len(now.replicas):
        return True
    if len(told.transfers) != len(now.transfers) or any(map(_transfer_differs, told.transfers, now.transfers)):
        return True
    return any(_replica_differs(one, other) for one, other in zip(told.replicas, now.replicas, strict=True))


def _device_differs(one: DeviceSnapshot, other: DeviceSnapshot) -> bool:
    step = max(MEMORY_STEP, int(MEMORY_SHARE * one.memory_total))
    if abs(one.memory_free - other.memory_free) >= step or one.memory_held != other.memory_held:
        return True
    return _still(one) != _still(other)


def _still(device: DeviceSnapshot) -> DeviceSnapshot:
    """Without what changes all the time."""
    return replace(device, memory_free=Bytes(0), temperature_celsius=None, utilisation_percent=None, power_watts=None)


def _replica_differs(one: ReplicaReport, other: ReplicaReport) -> bool:
    if abs((one.percent or 0.0) - (other.percent or 0.0)) >= PERCENT_STEP:
        return True
    return replace(one, percent=None) != replace(other, percent=None)


def _transfer_differs(one: TransferReport, other: TransferReport) -> bool:
    """The rate goes up and down all the time, and along with the next step."""
    if (one.model, one.variant, one.stage, one.note) != (other.model, other.variant, other.stage, other.note):
        return True
    return abs(other.done - one.done) * 100 >= PERCENT_STEP * max(1, other.total)
