"""The overview of a mesh: whom it shows, how it says what they told, and what it does with a thousand of them."""

from dataclasses import replace

import pytest
from fleets import MODELS, gpu, node

from tars.core.coordination_view import Move
from tars.core.placement import plan
from tars.core.records import NodeAdvert, ReplicaReport, TransferReport
from tars.core.types import Bytes, Deployment, ModelKind, NodeId, Plan, ReplicaId, ReplicaState
from tars.errors import DoesNotFit, InvalidParams
from tars.messages.mesh_state import MOST_REFUSED, MeshParams
from tars.messages.node import PeerDescription
from tars.serving.mesh_overview import describe_mesh, device_names

ONE, TWO = node("one", gpu("one", "RTX 3060")), node("two", gpu("two", "RTX 4090"))
(ASSIGNMENT,) = plan([TWO], MODELS, [Deployment("phi-2")]).assignments
FETCHING = ReplicaReport(ASSIGNMENT, ModelKind.CHAT, ReplicaState.STARTING, stage="fetch", percent=40.0)
TRANSFER = TransferReport("phi-2", "Q8_0", "fetch", Bytes(4), Bytes(10), 2.0, ("one",))
TOLD = {
    NodeId("one"): NodeAdvert(ONE, version="0.1"),
    NodeId("two"): NodeAdvert(
        TWO, version="0.2", replicas=(FETCHING,), client_url="http://two:8000", transfers=(TRANSFER,)
    ),
}


def peer(name, state="ALIVE", coordinator=False):
    return PeerDescription(
        node=name, name=name, state=state, addresses=[f"{name}:1"], coordinator=coordinator, since=7.0
    )


PEERS = [peer("one", coordinator=True), peer("two")]


def described(peers=PEERS, told=TOLD, *, plan=Plan(), moves=(), problems=None, isolated=False, **params):  # noqa: B008  # frozen
    return describe_mesh(
        MeshParams(**params), "one", peers, told, plan=plan, moves=moves, problems=problems or {}, isolated=isolated
    )


def test_each_node_is_there_with_what_it_told_of_itself():
    mesh = described()
    assert [(each.name, each.this_node, each.coordinator) for each in mesh.nodes] == [
        ("one", True, True),
        ("two", False, False),
    ]
    two = mesh.nodes[1]
    assert (two.version, two.client_url, two.state, two.since, two.addresses) == (
        "0.2", "http://two:8000", "ALIVE", 7.0, ["two:1"],
    )  # fmt: skip
    assert [(each.name, each.memory_total_bytes) for each in two.devices] == [
        (TWO.devices[0].name, int(TWO.devices[0].memory_total))
    ]
    (replica,) = two.replicas
    assert (replica.model, replica.state, replica.device_name) == ("phi-2", "starting", TWO.devices[0].name)
    assert (replica.progress.stage, replica.progress.percent) == ("fetch", 40.0)
    assert (replica.memory_bytes, replica.measured) == (int(ASSIGNMENT.memory.total), False)
    (transfer,) = two.transfers
    assert (transfer.bytes_done, transfer.bytes_total, transfer.bytes_per_second) == (4, 10, 2.0)
    assert transfer.sources == ["one"]
    assert mesh.nodes_by_state == {"ALIVE": 2}
    assert (mesh.coordinator, mesh.nodes_left_out, mesh.isolated) == ("one", 0, False)
    assert described(isolated=True).isolated


def test_a_replica_that_is_ready_has_what_it_really_took_and_no_progress():
    ready = replace(FETCHING, state=ReplicaState.READY, stage=None, percent=None, taken=Bytes(5), speed=33.0)
    told = {**TOLD, NodeId("two"): replace(TOLD[NodeId("two")], replicas=(ready,))}
    (replica,) = described(told=told).nodes[1].replicas
    assert (replica.progress, replica.memory_bytes, replica.measured, replica.speed) == (None, 5, True, 33.0)


def test_a_node_that_told_nothing_yet_is_shown_all_the_same():
    mesh = described([*PEERS, peer("three", "SUSPECT")])
    assert (mesh.nodes[1].name, mesh.nodes[1].devices, mesh.nodes[1].replicas) == ("three", [], [])


def test_of_many_nodes_those_are_shown_that_matter_and_the_others_are_counted():
    idle = [peer(f"idle-{n:03}") for n in range(990)]
    left = [peer(f"a-left-{n}", "LEFT") for n in range(7)]
    crowd = [*left, *idle, peer("zz-dead", "DEAD"), *PEERS]
    mesh = described(crowd)
    shown = [each.name for each in mesh.nodes]
    assert len(shown) == 50
    assert shown[0] == "one", "this node first, then by name"
    assert shown[1:] == sorted(shown[1:])
    assert {"two", "zz-dead"} <= set(shown), "who serves, and who is in trouble"
    assert not any(name.startswith("a-left") for name in shown)
    assert mesh.nodes_left_out == 1000 - 50
    assert mesh.nodes_by_state == {"ALIVE": 992, "DEAD": 1, "LEFT": 7}
    assert len(described(crowd, most_nodes=1000).nodes) == 1000


@pytest.mark.parametrize(("given", "name"), [("one", "one"), ("two", "two"), ("ffff-1", "box"), ("FFFF", "box")])
def test_one_node_is_named_by_its_name_its_id_or_its_beginning(given, name):
    box = peer("box").model_copy(update={"node": "ffff-1"})
    mesh = described([*PEERS, box], node=given)
    assert [each.name for each in mesh.nodes] == [name]
    assert mesh.nodes_left_out == 0, "the others were not asked for"


@pytest.mark.parametrize(
    ("given", "words"), [("nobody", "tars node list"), ("fff", "tars node list"), ("same", "2 nodes")]
)
def test_a_node_that_is_not_there_and_one_that_is_not_clear_are_said_so(given, words):
    two = [peer("same").model_copy(update={"node": f"ffff-{n}"}) for n in (1, 2)]
    with pytest.raises(InvalidParams, match=words):
        described([*PEERS, *two], node=given)


def test_moves_and_models_that_nobody_serves_are_there_with_the_reason():
    move = Move(
        ASSIGNMENT.replica, "phi-2", TWO.devices[0].id, ONE.devices[0].id, ReplicaId("next"), "two is to be drained"
    )
    whole = plan([ONE, TWO], MODELS, [Deployment("llama-3.1-70b")])
    problem = DoesNotFit("llama-3.1-70b fits on no device here.")
    mesh = described(plan=whole, moves=[move], problems={"llama-3.1-70b": problem})
    assert [(each.source, each.target, each.gain) for each in mesh.moves] == [
        (f"{TWO.devices[0].name} of two", f"{ONE.devices[0].name} of one", "two is to be drained")
    ]
    (unserved,) = mesh.unserved
    assert (unserved.model, unserved.why) == ("llama-3.1-70b", problem.message)
    assert {verdict.node_name for verdict in unserved.verdicts} == {"one", "two"}
    assert all(verdict.needed_bytes > verdict.free_bytes for verdict in unserved.verdicts)
    crowd = {f"m{n}": problem for n in range(MOST_REFUSED + 1)}
    assert len(described(problems=crowd).unserved) == MOST_REFUSED


def test_a_percent_out_of_bounds_does_not_hide_the_mesh():
    for percent, shown in ((-1.0, 0.0), (900.0, 100.0)):
        told = {**TOLD, NodeId("two"): replace(TOLD[NodeId("two")], replicas=(replace(FETCHING, percent=percent),))}
        assert described(told=told).nodes[1].replicas[0].progress.percent == shown


def test_devices_are_named_by_replica():
    assert device_names(TOLD.values()) == {ASSIGNMENT.replica: TWO.devices[0].name}
