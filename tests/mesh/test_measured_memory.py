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
from tars.mesh.measured_memory import MeasuredMemory
from tars.mesh.replicated_store import MemoryStore, ReplicatedStore, wall_ms
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


def memory_in(folder):
    return MeasuredMemory(ReplicatedStore(StateFolder(folder), NodeId("n")))


def test_a_measurement_outlives_a_restart(tmp_path):
    memory_in(tmp_path).learn(ASSIGNMENT, DEVICE, Bytes(5_000_000_000))
    assert memory_in(tmp_path).by_key() == {KEY: 5_000_000_000}


def test_another_context_is_another_load(tmp_path):
    measured = memory_in(tmp_path)
    measured.learn(ASSIGNMENT, DEVICE, Bytes(5_000_000_000))
    longer = replace(ASSIGNMENT, settings=replace(ASSIGNMENT.settings, context=8192))
    assert measured_key(longer, DEVICE) not in measured.by_key()


def test_a_simulated_device_teaches_nothing(tmp_path):
    measured = memory_in(tmp_path)
    measured.learn(ASSIGNMENT, replace(DEVICE, simulated=True), Bytes(5_000_000_000))
    measured.learn(ASSIGNMENT, DEVICE, Bytes(0))
    assert measured.by_key() == {}


def test_a_full_disk_keeps_the_measurement_in_memory(tmp_path, monkeypatch, caplog):
    measured = memory_in(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(state_folder.os, "fsync", full)
    measured.learn(ASSIGNMENT, DEVICE, Bytes(7))
    assert measured.by_key() == {KEY: 7}
    assert "not saved" in caplog.text


def test_a_peer_with_the_same_card_need_not_measure_again():
    here, there = MemoryStore(NodeId("n")), MemoryStore(NodeId("m"))
    MeasuredMemory(here).learn(ASSIGNMENT, DEVICE, Bytes(5_000_000_000))
    there.map.merge(here.map.records(), wall_ms())
    theirs = replace(DEVICE, id=DeviceId("m/gpu-7"), node=NodeId("m"))
    assert MeasuredMemory(there).by_key() == {measured_key(ASSIGNMENT, theirs): 5_000_000_000}
    other = replace(theirs, memory_total=Bytes.gib(8))
    assert measured_key(ASSIGNMENT, other) not in MeasuredMemory(there).by_key()


@pytest.mark.parametrize(
    ("again", "known"),
    [(990_000_000, 1_000_000_000), (1_001_000_000, 1_001_000_000), (970_000_000, 970_000_000)],
    ids=["hardly less", "more", "clearly less"],
)
def test_the_newest_measurement_stands_unless_it_says_the_same(again, known):
    store = MemoryStore(NodeId("n"))
    measured = MeasuredMemory(store)
    measured.learn(ASSIGNMENT, DEVICE, Bytes(1_000_000_000))
    before = store.map.root
    measured.learn(ASSIGNMENT, DEVICE, Bytes(again))
    assert measured.by_key() == {KEY: known}
    assert (store.map.root == before) == (known == 1_000_000_000)
