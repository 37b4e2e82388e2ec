"""When programs beside TARS want more of a device than is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleets import MODELS, gpu, node

from tars.core.coordination_view import CoordinationView, Scene
from tars.core.crowded_devices import CrowdedDevices
from tars.core.placement import plan
from tars.core.records import NodeAdvert, ReplicaReport
from tars.core.types import Bytes, Deployment, DeviceId, ModelKind, ReplicaState

PC = node("a", gpu("a", "RTX 3060"))
(CARD,) = PC.devices
(ASSIGNMENT,) = plan([PC], MODELS, [Deployment("phi-2")]).assignments
ROOM = CARD.memory_total - ASSIGNMENT.memory.total
"""What is left beside the replica, in bytes."""


@pytest.fixture
def crowds() -> CrowdedDevices:
    return CrowdedDevices(free=Bytes.mib(256), growth=Bytes.mib(512))


def seen(now: float, foreign: int, state: ReplicaState | None = ReplicaState.READY) -> Scene:
    """The PC with its replica, where other programs hold `foreign` bytes of its card."""
    held = 0 if state is None else ASSIGNMENT.memory.total
    device = replace(CARD, memory_held=Bytes(held), memory_free=Bytes(CARD.memory_total - held - foreign))
    reports = () if state is None else (ReplicaReport(ASSIGNMENT, ModelKind.CHAT, state),)
    return Scene(CoordinationView((NodeAdvert(replace(PC, devices=(device,)), replicas=reports),), (), now))


def test_a_device_is_crowded_from_when_others_took_what_was_left(crowds: CrowdedDevices) -> None:
    for now, foreign in ((0.0, 0), (1.0, ROOM - Bytes.mib(256)), (2.0, ROOM - Bytes.mib(255)), (3.0, ROOM)):
        crowds.note(seen(now, foreign))
        assert crowds.since == ({DeviceId("a/gpu-0"): 2.0} if now >= 2 else {})
    crowds.note(seen(4.0, 0))
    assert crowds.since == {}


def test_what_was_there_before_the_replica_crowds_nothing(crowds: CrowdedDevices) -> None:
    crowds.note(seen(0.0, ROOM - Bytes.mib(100), None))
    for now in (1.0, 2.0):
        crowds.note(seen(now, ROOM - Bytes.mib(100)))
        assert crowds.since == {}
    crowds.note(seen(3.0, 0))
    crowds.note(seen(4.0, ROOM - Bytes.mib(100)))
    assert list(crowds.since.values()) == [4.0], "it counts from the least that they held"


def test_without_a_replica_of_ours_nobody_is_in_the_way(crowds: CrowdedDevices) -> None:
    crowds.note(seen(0.0, 0, None))
    crowds.note(seen(1.0, CARD.memory_total, None))
    assert crowds.since == {}


@pytest.mark.parametrize("state", [ReplicaState.LOADING, ReplicaState.STOPPING])
def test_while_memory_is_in_motion_nothing_can_be_told(crowds: CrowdedDevices, state: ReplicaState) -> None:
    crowds.note(seen(0.0, 0))
    crowds.note(seen(1.0, ROOM))
    assert list(crowds.since.values()) == [1.0]
    crowds.note(seen(2.0, ROOM, state))
    assert crowds.since == {}
    crowds.note(seen(3.0, ROOM))
    assert crowds.since == {}, "what they hold now is what it counts from"


def test_a_device_that_is_gone_is_crowded_no_more(crowds: CrowdedDevices) -> None:
    crowds.note(seen(0.0, 0))
    crowds.note(seen(1.0, ROOM))
    crowds.note(Scene(CoordinationView((), (), 2.0)))
    assert crowds.since == {}
