"""What loads really took."""

import errno
from dataclasses import replace

import pytest

from tars import state_folder
from tars.core.placement import measured_key
from tars.core.types import (
    Assignment,
    Bytes,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    MemoryEstimate,
    NodeId,
    ReplicaId,
    RuntimeSettings,
)
from tars.mesh.measured_memory import FILE, MeasuredMemory
from tars.state_folder import StateFolder

DEVICE = DeviceSnapshot(DeviceId("n/gpu-1"), NodeId("n"), DeviceKind.CUDA, "RTX 3060", Bytes.gib(12), Bytes.gib(12))
ASSIGNMENT = Assignment(
    replica=ReplicaId("m@1#0"),
    model="m",
    variant="Q4_K_M",
    device=DEVICE.id,
    node=NodeId("n"),
    memory=MemoryEstimate(Bytes.gib(4), Bytes.mib(512), Bytes.mib(300), Bytes.mib(450)),
    settings=RuntimeSettings(context=4096),
    reason="",
)
KEY = measured_key(ASSIGNMENT, DEVICE)


def test_a_measurement_outlives_a_restart(tmp_path):
    MeasuredMemory(StateFolder(tmp_path)).learn(ASSIGNMENT, DEVICE, Bytes(5_000_000_000))
    assert MeasuredMemory(StateFolder(tmp_path)).by_key() == {KEY: 5_000_000_000}


def test_another_context_is_another_load(tmp_path):
    measured = MeasuredMemory(StateFolder(tmp_path))
    measured.learn(ASSIGNMENT, DEVICE, Bytes(5_000_000_000))
    longer = replace(ASSIGNMENT, settings=replace(ASSIGNMENT.settings, context=8192))
    assert measured_key(longer, DEVICE) not in measured.by_key()


def test_a_simulated_device_teaches_nothing(tmp_path):
    measured = MeasuredMemory(StateFolder(tmp_path))
    measured.learn(ASSIGNMENT, replace(DEVICE, simulated=True), Bytes(5_000_000_000))
    measured.learn(ASSIGNMENT, DEVICE, Bytes(0))
    assert measured.by_key() == {}


def test_a_full_disk_keeps_the_measurement_in_memory(tmp_path, monkeypatch, caplog):
    measured = MeasuredMemory(StateFolder(tmp_path))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(state_folder.os, "fsync", full)
    measured.learn(ASSIGNMENT, DEVICE, Bytes(7))
    assert measured.by_key() == {KEY: 7}
    assert "not saved" in caplog.text


@pytest.mark.parametrize("content", [b"[]", b'{"measured": [{"key": {"nope": 1}, "bytes": 2}]}', b"{"])
def test_a_damaged_file_is_measured_anew(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    assert MeasuredMemory(StateFolder(tmp_path)).by_key() == {}
