"""What a node tells of itself, on a coordinator whose workers only pretend to load."""

import time

import pytest
from coordinator_bench import make_bench

from tars.core.types import Deployment
from tars.errors import InvalidParams, Overloaded
from tars.messages.mesh_state import MeshParams
from tars.serving.call_log import CallLog
from tars.serving.idempotency import IdempotentAnswers
from tars.serving.local_fleet import LocalFleet
from tars.serving.local_view import LocalView
from tars.serving.node_description import NodeDescriber
from tars.serving.router import Router


@pytest.fixture
def bench(tmp_path, tiny_gguf):
    return make_bench(tmp_path, tiny_gguf)


@pytest.fixture
def calls():
    return CallLog(time.time)


@pytest.fixture
def describer(bench, calls):
    fleet = LocalFleet(bench.coordinator)
    return NodeDescriber(
        bench.coordinator,
        LocalView(bench.coordinator, fleet, "pc", time.monotonic),
        fleet,
        Router(fleet),
        calls,
        IdempotentAnswers(time.monotonic),
        name="pc",
        wsl2=False,
        addresses=lambda: ["http://127.0.0.1:8000"],
    )


async def test_describe_shows_device_replica_and_errors(bench, calls, describer):
    bench.deployments.deploy(Deployment("tiny"))
    await bench.coordinator.reconcile()
    bench.told = {bench.devices[0].id: {bench.workers[0].pid: 50 * 2**20}}
    bench.workers[0].loaded()
    await bench.coordinator.reconcile()
    calls.started("inference.chat")
    calls.ended("inference.chat", Overloaded("busy"), "t1")
    described = await describer.node("ready")
    assert described.devices[0].memory_held_bytes == 50 * 2**20
    assert (described.replicas[0].state, described.replicas[0].device_name) == ("ready", "Card gpu-a")
    assert (described.calls.total, described.calls.failed) == (1, 1)
    assert described.recent_errors[0].trace_id == "t1"


async def test_a_node_alone_is_its_only_peer_and_its_whole_mesh(bench, describer):
    (me,) = describer.peers().peers
    assert (me.node, me.state, me.addresses) == (bench.coordinator.node_id, "ALIVE", ["http://127.0.0.1:8000"])
    assert [each.name for each in describer.mesh(MeshParams()).nodes] == ["pc"]
    with pytest.raises(InvalidParams, match="no node with that id or name"):
        describer.mesh(MeshParams(node="elsewhere"))
    bench.coordinator.draining.set(True)
    assert describer.peers().peers[0].state == "DRAINING"
