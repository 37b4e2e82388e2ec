"""A view, sorted for looking things up."""

from __future__ import annotations

from dataclasses import replace

from fleets import MODELS, gpu, node

from tars.core.coordination_view import CoordinationView, Scene, same_load
from tars.core.placement import plan
from tars.core.records import HeldFile, NodeAdvert, Orders, ReplicaReport, Wish
from tars.core.types import Bytes, Deployment, ModelKind, NodeId, ReplicaState

PC, OTHER = node("a", gpu("a")), node("b", gpu("b"))
(ASSIGNMENT,) = plan([PC], MODELS, [Deployment("phi-2")]).assignments
FILES = (HeldFile("phi-2", "Q8_0", Bytes(1)),)


def scene(*adverts: NodeAdvert, wish: Deployment | None = None, orders: Orders | None = None) -> Scene:
    return Scene(
        CoordinationView(
            adverts,
            (Wish(wish or Deployment("phi-2")),),
            0.0,
            orders={} if orders is None else {orders.node: orders},
            models=MODELS,
        )
    )


def report(state: ReplicaState, stage: str | None = None) -> ReplicaReport:
    return ReplicaReport(ASSIGNMENT, ModelKind.CHAT, state, stage=stage)


def test_a_node_speaks_for_its_own_devices_only() -> None:
    liar = NodeAdvert(OTHER, replicas=(report(ReplicaState.READY),), files=FILES)
    assert scene(NodeAdvert(PC, files=FILES), liar).reports == {}
    theirs = Orders(NodeId("b"), NodeId("b"), (ASSIGNMENT,))
    assert scene(NodeAdvert(PC), NodeAdvert(OTHER), orders=theirs).ordered == {}


def test_a_state_is_of_the_very_same_load() -> None:
    seen = scene(NodeAdvert(PC, replicas=(report(ReplicaState.READY),)))
    assert seen.state(ASSIGNMENT) is ReplicaState.READY
    other = replace(ASSIGNMENT, settings=replace(ASSIGNMENT.settings, context=99))
    assert not same_load(ASSIGNMENT, other)
    assert seen.state(other) is None
    assert same_load(ASSIGNMENT, replace(ASSIGNMENT, reason="other words"))


def test_what_is_asked_for_does_not_depend_on_the_place() -> None:
    advert = NodeAdvert(replace(PC, draining=True), files=FILES)
    assert scene(advert).asked_for(ASSIGNMENT)
    assert not scene(advert, wish=Deployment("phi-2", context=512)).asked_for(ASSIGNMENT)
    assert not scene(advert, wish=Deployment("mistral-7b")).asked_for(ASSIGNMENT)


def test_a_device_is_in_motion_while_something_loads_or_ends_there_but_not_for_a_copy() -> None:
    for state, stage, moving in (
        (ReplicaState.LOADING, "load", True),
        (ReplicaState.STOPPING, None, True),
        (ReplicaState.RESTARTING, None, True),
        (ReplicaState.STARTING, "fetch", False),
        (ReplicaState.READY, None, False),
        (ReplicaState.FAILED, None, False),
    ):
        assert scene(NodeAdvert(PC, replicas=(report(state, stage),))).in_motion() == (
            {ASSIGNMENT.device} if moving else set()
        )


def test_a_wish_without_any_file_is_no_deployment_yet() -> None:
    assert scene(NodeAdvert(PC)).deployments == []
    assert scene(NodeAdvert(PC, files=FILES)).deployments == [Deployment("phi-2")]


def test_places_are_named_for_people() -> None:
    assert scene(NodeAdvert(PC)).place(ASSIGNMENT.device) == "RTX 3060 of a"
