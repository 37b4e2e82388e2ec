"""Which move is due, which weighs most, and what must be at rest first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleets import gpu, node
from pretend_mesh import PretendMesh

from tars.core.coordination_view import CoordinationSettings, Scene
from tars.core.placement_wants import Circumstances
from tars.core.reasons_to_move import DueMove, ReasonsToMove
from tars.core.types import Deployment, DeviceId, NodeId, ReplicaState

SETTINGS = CoordinationSettings()
B = DeviceId("b/gpu-0")
GIB = 2**30


class Watched:
    """A mesh whose replicas stay where they are, and what would be due there."""

    def __init__(self, mesh: PretendMesh):
        self.mesh = mesh
        self.reasons = ReasonsToMove(SETTINGS)

    def due(self, after: float = 0.0, failed=()) -> DueMove | None:
        self.mesh.now += after
        scene = Scene(self.mesh.view())
        self.reasons.note(scene)
        found = self.mesh.coordination.preview(self.mesh.view())
        return self.reasons.due(scene, found, Circumstances(), dict.fromkeys(failed, "it is broken"), lambda each: 0.0)


def mesh(*wanted: Deployment, cards: str = "RTX 4090") -> PretendMesh:
    """`wanted` runs on `a`; `b` has come since."""
    made = PretendMesh([node("a", gpu("a", cards)), node("b", gpu("b", "GTX 1660 SUPER"))], wanted)
    made.die("b")
    made.settle()
    made.pcs[NodeId("b")].alive = True
    made.orders[NodeId("b")] = replace(made.orders[NodeId("a")], node=NodeId("b"), assignments=())
    return made


def together() -> PretendMesh:
    return mesh(Deployment("phi-2", replicas=2))


def test_nothing_is_due_where_all_is_well() -> None:
    watched = Watched(mesh(Deployment("phi-2")))
    assert watched.due() is None
    assert watched.due(1000) is None
    assert list(watched.reasons.ends()) == []


def test_two_replicas_that_are_together_part_when_it_has_lasted() -> None:
    watched = Watched(together())
    assert watched.due() is None
    assert list(watched.reasons.ends()) == [SETTINGS.spread_hold]
    assert watched.due(SETTINGS.spread_hold - 0.1) is None
    due = watched.due(0.1)
    assert due is not None
    assert (due.home.assignment.device, due.home.device.id) == ("a/gpu-0", B)
    assert due.gain == "phi-2 is on a more than once, and b goes on with it when a dies"


def test_not_to_where_a_load_of_it_failed_lately() -> None:
    watched = Watched(together())
    variant = watched.mesh.decision.plan.assignments[0].variant
    failed = [("phi-2", variant, B)]
    assert watched.due(failed=failed) is None
    assert watched.due(SETTINGS.spread_hold, failed=failed) is None
    assert watched.due() is None, "from now on it lasts"
    assert watched.due(SETTINGS.spread_hold) is not None


def refused() -> PretendMesh:
    """On `a` is a small model in the place of a large one."""
    made = mesh(Deployment("phi-2"))
    made.wanted.append(Deployment("deepseek-33b"))
    made.settle()
    return made


def test_a_small_model_makes_room_for_a_large_one_that_is_refused_for_long() -> None:
    watched = Watched(refused())
    assert watched.due() is None
    assert list(watched.reasons.ends()) == [watched.mesh.now + SETTINGS.move_hold]
    due = watched.due(SETTINGS.move_hold)
    assert due is not None
    assert (due.home.assignment.model, due.home.device.id) == ("phi-2", B)
    assert due.gain.startswith("makes room for deepseek-33b, which fits nowhere else and needs ")


def test_a_refusal_that_ends_in_between_begins_anew() -> None:
    watched = Watched(refused())
    large = watched.mesh.wanted.pop()
    assert watched.due() is None
    watched.mesh.wanted.append(large)
    assert watched.due(SETTINGS.move_hold) is None
    assert watched.due(SETTINGS.move_hold) is not None


def crowd(made: PretendMesh) -> None:
    (device,) = made.pcs[NodeId("a")].advert().node.devices
    made.pcs[NodeId("a")].foreign[device.id] = device.memory_free - 100 * 2**20


def test_a_replica_makes_way_for_a_program_that_takes_the_rest_of_its_device() -> None:
    watched = Watched(mesh(Deployment("phi-2")))
    assert watched.due() is None
    crowd(watched.mesh)
    assert watched.due() is None
    assert list(watched.reasons.ends()) == [SETTINGS.crowd_hold]
    due = watched.due(SETTINGS.crowd_hold)
    assert due is not None
    assert due.home.device.id == B
    assert due.gain.endswith("of RTX 4090 of a to a program that needs more there")


def test_a_program_goes_before_a_refused_model_and_that_before_replicas_that_are_together() -> None:
    made = mesh(Deployment("qwen-0.5b", replicas=2))
    made.wanted.append(Deployment("deepseek-33b", context=16384))
    made.settle()
    watched = Watched(made)
    watched.due()
    assert "more than once" in watched.due(SETTINGS.spread_hold).gain
    assert "makes room for deepseek-33b" in watched.due(SETTINGS.move_hold).gain
    crowd(made)
    watched.due()
    assert "to a program that needs more there" in watched.due(SETTINGS.crowd_hold).gain


@pytest.mark.parametrize("what", ["loads", "ends", "is ordered", "is planned"])
def test_nothing_is_due_while_anything_is_in_motion(what: str) -> None:
    made = mesh(Deployment("phi-2", replicas=2), Deployment("minilm"))
    watched = Watched(made)
    watched.due()
    a = made.pcs[NodeId("a")]
    (small,) = (each for each in made.decision.plan.assignments if each.model == "minilm")
    report = a.replicas[small.replica]
    match what:
        case "loads":
            a.replicas[small.replica] = replace(report, state=ReplicaState.LOADING)
        case "ends":
            a.replicas[small.replica] = replace(report, state=ReplicaState.STOPPING)
        case "is ordered":
            stray = replace(small, replica=small.replica[:-1] + "7")
            orders = made.orders[NodeId("a")]
            made.orders[NodeId("a")] = replace(orders, assignments=(*orders.assignments, stray))
        case "is planned":
            made.wanted.append(Deployment("nomic"))
    assert watched.due(SETTINGS.spread_hold) is None
    a.replicas[small.replica] = report
    made.orders[NodeId("a")] = replace(
        made.orders[NodeId("a")], assignments=tuple(each.assignment for each in a.replicas.values())
    )
    made.wanted = made.wanted[:2]
    assert watched.due() is not None
