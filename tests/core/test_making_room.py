"""Which healthy replica moves to make room, and that the cheapest sufficient move is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fleets import MODELS, cpu, gpu, holding, node

from tars.core.making_room import Ground
from tars.core.placement import plan
from tars.core.placement_wants import Circumstances
from tars.core.types import Assignment, Deployment, DeviceId, NodeId, NodeSnapshot, ReplicaId


def ground(
    nodes: Sequence[NodeSnapshot],
    loaded: Sequence[Deployment],
    refused: Deployment,
    circumstances: Circumstances | None = None,
) -> tuple[Ground, dict[str, Assignment]]:
    """`loaded` runs where it is pinned; afterwards nobody pins anything."""
    there = plan(nodes, MODELS, loaded).assignments
    assert len(there) == sum(each.replicas for each in loaded)
    wanted = {each.model: (replace(each, device=None), MODELS[each.model]) for each in (*loaded, refused)}
    return (
        Ground(holding(nodes, there), there, wanted, {}, circumstances or Circumstances()),
        {each.replica: each for each in there},
    )


BIG, SMALL = node("a", gpu("a", "RTX 4090")), node("b", gpu("b", "GTX 1660 SUPER"))
LARGE = Deployment("deepseek-33b", context=4096, slots=2)


def test_the_replica_that_is_in_the_way_goes_where_it_fits() -> None:
    made, movable = ground([BIG, SMALL], [Deployment("phi-2", device="a/gpu-0")], LARGE)
    room = made.for_model("deepseek-33b", movable, 2.0)
    assert room is not None
    assert [(move.assignment.model, move.device.id) for move in room.moves] == [("phi-2", "b/gpu-0")]
    assert room.device.id == "a/gpu-0"
    assert room.moved == room.moves[0].cost.need


def test_the_smallest_replica_that_suffices_moves() -> None:
    third = node("c", gpu("c", "RTX 3060"))
    # 23.0 GiB can be had; the 33B needs 19.9: either of the two suffices.
    loaded = [Deployment("phi-2", device="a/gpu-0"), Deployment("minilm", device="a/gpu-0", slots=1)]
    made, movable = ground([BIG, third], loaded, Deployment("deepseek-33b", context=512, slots=1))
    room = made.for_model("deepseek-33b", movable, 2.0)
    assert room is not None
    assert len(room.moves) == 1
    least = min(
        each.memory.total for each in movable.values() if made.for_model("deepseek-33b", {each.replica: each}, 2.0)
    )
    assert room.moves[0].assignment.memory.total == least


def test_several_small_ones_move_where_no_single_one_suffices() -> None:
    third = node("c", gpu("c", "RTX 3060"))
    loaded = [Deployment("phi-2", device="a/gpu-0"), Deployment("stablelm-3b", device="a/gpu-0")]
    made, movable = ground([BIG, third], loaded, LARGE)
    room = made.for_model("deepseek-33b", movable, 2.0)
    assert room is not None
    assert {move.assignment.model for move in room.moves} == {"phi-2", "stablelm-3b"}


def test_nothing_moves_for_less_than_it_costs_nor_without_being_movable_nor_where_nothing_fits() -> None:
    loaded = [Deployment("phi-2", device="a/gpu-0")]
    made, movable = ground([BIG, SMALL], loaded, LARGE)
    assert made.for_model("deepseek-33b", movable, 0.1) is None
    assert made.for_model("deepseek-33b", {}, 2.0) is None
    full, movable = ground([BIG, node("b", gpu("b", "GTX 1660 SUPER", free_mib=1000))], loaded, LARGE)
    assert full.for_model("deepseek-33b", movable, 2.0) is None


def test_a_replica_does_not_go_from_a_gpu_to_a_cpu_nor_where_it_is_barred_nor_to_a_node_that_drains() -> None:
    (there,) = plan([BIG], MODELS, [Deployment("phi-2")]).assignments
    for other, bars in (
        (node("b", cpu("b", 64)), {}),
        (SMALL, {("phi-2", "Q8_0", DeviceId("b/gpu-0")): "it failed"}),
        (replace(SMALL, draining=True), {}),
    ):
        made = Ground(
            [BIG, other],
            [there],
            {"phi-2": (Deployment("phi-2"), MODELS["phi-2"])},
            {},
            Circumstances(bars=bars),
        )
        assert made.elsewhere(there) is None


def test_among_several_homes_one_that_has_the_file_is_taken_and_then_the_tightest() -> None:
    (there,) = plan([BIG], MODELS, [Deployment("phi-2")]).assignments
    nodes = [BIG, SMALL, node("c", gpu("c", "RTX 3060"))]
    wanted = {"phi-2": (Deployment("phi-2"), MODELS["phi-2"])}

    def home(**known: object) -> str:
        found = Ground(nodes, [there], wanted, {}, Circumstances(**known)).elsewhere(there)  # type: ignore[arg-type]
        assert found is not None
        return found.device.id

    assert home() == "b/gpu-0"
    sibling = replace(there, replica=ReplicaId("phi-2@b-gpu-0#0"), node=NodeId("b"), device=DeviceId("b/gpu-0"))
    beside = Ground(
        [*nodes[:1], node("b", gpu("b", "RTX 4090")), nodes[2]], [there, sibling], wanted, {}, Circumstances()
    )
    found = beside.elsewhere(there)
    assert found is not None
    assert found.device.id == "c/gpu-0", "not beside another replica of the model"
    assert home(holders={"phi-2": [NodeId("c")]}) == "c/gpu-0"
