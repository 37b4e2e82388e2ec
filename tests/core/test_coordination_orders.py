"""How a plan becomes orders: one load a device at a time, nothing before its memory is free, and no order written twice."""

from __future__ import annotations

from dataclasses import replace

from fleets import gpu, node
from pretend_mesh import PretendMesh

from tars.core.types import Deployment, NodeId, ReplicaState

TWO = [node("pc1", gpu("pc1", "RTX 3060")), node("pc2", gpu("pc2", "GTX 1660 SUPER"))]


def test_wishes_become_loads_one_a_device_at_a_time() -> None:
    mesh = PretendMesh([node("a", gpu("a", "RTX 4090"))], [Deployment("mistral-7b", replicas=3)])
    for loaded in (0, 1, 2):
        orders = mesh.decide().orders[NodeId("a")]
        assert len(orders) == loaded + 1
        mesh.obey()
        assert mesh.decide().orders[NodeId("a")] == orders, "nothing more while one loads"
        mesh.finish()
    assert len(mesh.decision.plan.assignments) == 3


def loads(mesh: PretendMesh, name: str) -> list[str]:
    """The models that a node with one device loads, in their order."""
    order: list[str] = []
    while True:
        mesh.decide()
        mesh.obey()
        loading = [each for each in mesh.pcs[NodeId(name)].replicas.values() if each.state is ReplicaState.LOADING]
        if not loading:
            return order
        order += [each.assignment.model for each in loading]
        mesh.finish()


def test_what_is_there_soonest_is_loaded_first() -> None:
    wanted = [Deployment(model) for model in ("llama-3.1-8b", "minilm", "phi-2")]
    assert loads(PretendMesh([node("a", gpu("a", "RTX 4090"))], wanted), "a") == ["minilm", "phi-2", "llama-3.1-8b"]


def test_what_matters_more_is_loaded_before_what_is_there_sooner() -> None:
    wanted = [Deployment("llama-3.1-8b", priority=1), Deployment("minilm"), Deployment("phi-2")]
    assert loads(PretendMesh([node("a", gpu("a", "RTX 4090"))], wanted), "a") == ["llama-3.1-8b", "minilm", "phi-2"]


def test_a_model_that_nobody_serves_is_loaded_before_another_replica_of_one_that_somebody_does() -> None:
    mesh = PretendMesh(
        [node("a", gpu("a", "RTX 4090")), node("b", gpu("b", "GTX 1660 SUPER"))],
        [Deployment("minilm", replicas=2), Deployment("phi-2", device="a/gpu-0")],
    )
    mesh.run("minilm", "b/gpu-0")
    assert loads(mesh, "a") == ["phi-2", "minilm"]


def test_a_pc_that_is_back_loads_by_the_same_order_what_it_was_ordered_to_hold() -> None:
    mesh = PretendMesh([node("a", gpu("a", "RTX 4090"))], [Deployment(model) for model in ("minilm", "phi-2")])
    mesh.settle()
    mesh.die("a")
    mesh.decide()
    mesh.pcs[NodeId("a")].alive = True
    assert [each.model for each in mesh.orders[NodeId("a")].assignments] == ["minilm", "phi-2"]
    assert loads(mesh, "a") == ["minilm", "phi-2"]


def test_two_devices_load_side_by_side() -> None:
    mesh = PretendMesh(TWO, [Deployment("mistral-7b"), Deployment("phi-2")])
    assert [len(orders) for orders in mesh.decide().orders.values()] == [1, 1]


def test_a_copy_of_a_file_does_not_keep_the_device_from_loading_something_else() -> None:
    mesh = PretendMesh([node("a", gpu("a", "RTX 4090"))], [Deployment("mistral-7b"), Deployment("phi-2")])
    mesh.decide()
    mesh.obey()
    replicas = mesh.pcs[NodeId("a")].replicas
    (first,) = replicas
    replicas[first] = replace(replicas[first], state=ReplicaState.STARTING, stage="fetch", percent=3.0)
    assert len(mesh.decide().orders[NodeId("a")]) == 2


def test_an_order_that_says_the_same_is_not_written_again() -> None:
    mesh = PretendMesh(TWO, [Deployment("mistral-7b"), Deployment("phi-2")])
    mesh.settle()
    before = mesh.orders
    mesh.now += 5
    assert {each: orders.assignments for each, orders in before.items()} == mesh.decide().orders


def test_a_changed_wish_unloads_the_old_replica_before_it_loads_the_new_one() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2", context=1024)])
    mesh.settle()
    mesh.wanted = [Deployment("phi-2", context=2048)]
    assert not any(mesh.decide().orders.values())
    mesh.settle()
    assert [each.settings.context for each in mesh.decision.plan.assignments] == [2048]
    assert len(mesh.ready()["phi-2"]) == 1
