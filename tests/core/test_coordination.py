"""The coordinator's decisions: what stays, what is loaded next, what moves and why, and that it comes to rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleets import MODELS, gpu, node, random_fleet
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_mesh import PretendMesh

from tars.core.coordination import Coordination
from tars.core.placement_cost import measured_key
from tars.core.records import HeldFile, Wish
from tars.core.types import Bytes, Deployment, DeviceId, NodeId, ReplicaState

TWO = [node("pc1", gpu("pc1", "RTX 3060")), node("pc2", gpu("pc2", "GTX 1660 SUPER"))]
GIB = 2**30


def pc(mesh: PretendMesh, name: str):
    return mesh.pcs[NodeId(name)]


# --- one step after the other ----------------------------------------------------------------------------------------


def test_what_fits_nowhere_is_refused_and_never_ordered() -> None:
    mesh = PretendMesh(TWO, [Deployment("llama-3.1-70b"), Deployment("phi-2")])
    mesh.settle()
    assert list(mesh.ready()) == ["phi-2"]
    assert [refusal.model for refusal in mesh.decision.plan.refusals] == ["llama-3.1-70b"]


# --- nodes come and go -----------------------------------------------------------------------------------------------


def test_the_loss_of_a_node_loads_its_models_elsewhere_and_moves_nothing_else() -> None:
    mesh = PretendMesh([*TWO, node("pc3", gpu("pc3", "RTX 3060"))], [Deployment("mistral-7b"), Deployment("phi-2")])
    mesh.settle()
    (home,) = mesh.ready()["mistral-7b"]
    mesh.die(home.partition("/")[0])
    mesh.settle()
    assert set(mesh.ready()) == {"mistral-7b", "phi-2"}
    assert mesh.unloaded == []


def test_a_node_that_joins_changes_nothing_but_what_was_missing() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2"), Deployment("mistral-7b", replicas=3)])
    mesh.settle()
    before = mesh.ready()
    new = PretendMesh([node("pc0", gpu("pc0", "RTX 4090"))]).pcs
    mesh.pcs.update(new)
    mesh.settle()
    after = mesh.ready()
    assert all(set(devices) <= set(after[model]) for model, devices in before.items())
    assert "pc0/gpu-0" in after["mistral-7b"]
    assert not mesh.unloaded


def test_after_a_partition_the_ready_replica_stays_and_then_the_one_held_longest() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2")])
    loading = mesh.run("phi-2", "pc1/gpu-0", ReplicaState.LOADING)
    mesh.run("phi-2", "pc2/gpu-0")
    mesh.decide()
    mesh.obey()
    assert mesh.ready() == {"phi-2": ["pc2/gpu-0"]}
    assert mesh.unloaded == [loading.replica]
    mesh.wait(100)
    mesh.run("phi-2", "pc1/gpu-0")
    mesh.settle()
    assert mesh.ready() == {"phi-2": ["pc2/gpu-0"]}


@pytest.mark.parametrize("dies", ["a", "b"])
def test_a_pc_that_is_back_with_nothing_does_not_take_what_another_one_loads_by_now(dies: str) -> None:
    """The order that it was given before it died is still in force, and says only what it had."""
    other = "b" if dies == "a" else "a"
    mesh = PretendMesh([node("a", gpu("a")), node("b", gpu("b"))], [Deployment("phi-2", device=f"{dies}/gpu-0")])
    mesh.settle()
    mesh.wanted = [Deployment("phi-2")]
    mesh.settle()
    assert mesh.ready() == {"phi-2": [f"{dies}/gpu-0"]}
    mesh.die(dies)
    mesh.decide()
    mesh.obey()
    pc(mesh, dies).alive = True
    assert mesh.orders[NodeId(dies)].assignments
    mesh.settle()
    assert mesh.ready() == {"phi-2": [f"{other}/gpu-0"]}
    assert mesh.unloaded == []


def test_another_coordinator_moves_nothing() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2", replicas=2), Deployment("mistral-7b")])
    mesh.settle()
    before, mesh.coordination = mesh.ready(), Coordination()
    mesh.wait(300)
    assert mesh.ready() == before
    assert mesh.unloaded == []


def test_an_order_that_nobody_reports_is_kept_for_a_while() -> None:
    mesh = PretendMesh([node("a", gpu("a")), node("b", gpu("b"))], [Deployment("phi-2")])
    mesh.decide()
    (first,) = mesh.decision.plan.assignments
    mesh.pcs[NodeId("c")] = PretendMesh([node("c", gpu("c", "RTX 4090"))]).pcs[NodeId("c")]
    mesh.now += 20
    assert [each.device for each in mesh.decide().plan.assignments] == [first.device]


def huddled() -> PretendMesh:
    """Two replicas on `a`, because `b` was away, and it is back."""
    nodes = [node("a", gpu("a", "RTX 4090")), node("b", gpu("b", "GTX 1660 SUPER"))]
    mesh = PretendMesh(nodes, [Deployment("phi-2", replicas=2)])
    mesh.settle()
    mesh.die("b")
    mesh.wait(100)
    assert mesh.ready()["phi-2"] == ["a/gpu-0", "a/gpu-0"]
    pc(mesh, "b").alive = True
    mesh.settle()
    mesh.unloaded.clear()
    return mesh


def test_two_replicas_on_one_pc_part_when_another_one_has_room_and_stays() -> None:
    mesh = huddled()
    mesh.wait(9)
    assert mesh.ready() == {"phi-2": ["a/gpu-0", "a/gpu-0"]}
    mesh.now += 2
    decision = mesh.decide()
    (move,) = decision.moves
    assert (move.source, move.target) == ("a/gpu-0", "b/gpu-0")
    assert move.gain == "phi-2 is on a more than once, and b goes on with it when a dies"
    mesh.obey()
    assert mesh.unloaded == [], "not before it is ready there"
    mesh.settle()
    assert mesh.ready() == {"phi-2": ["a/gpu-0", "b/gpu-0"]}
    assert mesh.unloaded == [move.replica]
    mesh.wait(500)
    assert mesh.unloaded == [move.replica]


def test_two_replicas_stay_together_where_the_other_pc_has_no_room_or_is_not_allowed() -> None:
    full = huddled()
    pc(full, "b").foreign[DeviceId("b/gpu-0")] = 5 * GIB
    pinned = huddled()
    pinned.wanted = [Deployment("phi-2", replicas=2, device="a/gpu-0")]
    draining = huddled()
    pc(draining, "b").draining = True
    for mesh in (full, pinned, draining):
        mesh.settle()
        mesh.wait(500)
        assert mesh.ready()["phi-2"] == ["a/gpu-0", "a/gpu-0"]
        assert mesh.unloaded == []


def test_where_the_load_failed_two_replicas_stay_together_for_an_hour() -> None:
    mesh = huddled()
    mesh.fails.add(("phi-2", DeviceId("b/gpu-0")))
    mesh.wait(100)
    assert mesh.ready()["phi-2"] == ["a/gpu-0", "a/gpu-0"]
    (tried,) = mesh.unloaded
    mesh.wait(3400)
    assert mesh.unloaded == [tried]
    mesh.fails.clear()
    mesh.wait(300)
    assert mesh.ready()["phi-2"] == ["a/gpu-0", "b/gpu-0"]


def test_a_pc_that_stays_only_for_a_moment_moves_nothing() -> None:
    mesh = huddled()
    mesh.wait(5)
    mesh.die("b")
    mesh.settle()
    pc(mesh, "b").alive = True
    mesh.settle()
    mesh.wait(9)
    assert mesh.unloaded == []


def test_more_replicas_than_pcs_are_spread_as_far_as_it_goes() -> None:
    mesh = PretendMesh([node(name, gpu(name, "RTX 4090")) for name in "ab"], [Deployment("phi-2", replicas=4)])
    mesh.settle()
    before = mesh.ready()
    mesh.wait(500)
    assert mesh.ready() == before
    assert mesh.unloaded == []


# --- drain -----------------------------------------------------------------------------------------------------------


def test_a_drained_node_keeps_its_replica_until_it_is_ready_elsewhere() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2")])
    mesh.settle()
    (home,) = mesh.ready()["phi-2"]
    name = home.partition("/")[0]
    pc(mesh, name).draining = True
    decision = mesh.decide()
    (move,) = decision.moves
    assert (move.model, move.source, move.gain) == ("phi-2", home, f"{name} is draining and gets its memory back")
    assert sum(len(orders) for orders in decision.orders.values()) == 2
    mesh.obey()
    assert len(mesh.decide().orders[NodeId(name)]) == 1, "not before the other one is ready"
    mesh.finish()
    assert mesh.decide().orders[NodeId(name)] == ()
    mesh.settle()
    assert mesh.ready() == {"phi-2": [move.target]}
    assert mesh.decision.moves == ()


def test_what_fits_nowhere_else_is_unloaded_by_a_drain_and_taken_back_by_a_resume() -> None:
    mesh = PretendMesh(TWO, [Deployment("mistral-7b"), Deployment("phi-2", device="pc2/gpu-0")])
    mesh.settle()
    assert mesh.ready()["mistral-7b"] == ["pc1/gpu-0"]
    pc(mesh, "pc1").draining = True
    assert mesh.decide().orders[NodeId("pc1")] == ()
    mesh.settle()
    assert "mistral-7b" not in mesh.ready()
    pc(mesh, "pc1").draining = False
    mesh.settle()
    assert mesh.ready()["mistral-7b"] == ["pc1/gpu-0"]


def test_a_lone_node_that_drains_frees_its_memory() -> None:
    mesh = PretendMesh(TWO[:1], [Deployment("phi-2")])
    mesh.settle()
    pc(mesh, "pc1").draining = True
    mesh.settle()
    assert mesh.ready() == {}
    assert "drains" in mesh.decision.plan.refusals[0].remedy


def test_a_drain_waits_for_a_slow_copy_only_so_long() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2")])
    mesh.settle()
    (home,) = mesh.ready()["phi-2"]
    name = NodeId(home.partition("/")[0])
    pc(mesh, name).draining = True
    mesh.decide()
    mesh.obey()
    mesh.now += 119
    assert len(mesh.decide().orders[name]) == 1
    mesh.now += 1
    assert mesh.decide().orders[name] == ()


# --- other programs --------------------------------------------------------------------------------------------------


def test_a_device_whose_cap_was_lowered_loses_the_least_important_replica_after_a_hold() -> None:
    mesh = PretendMesh([node("a", gpu("a"))], [Deployment("mistral-7b", priority=1), Deployment("phi-2")])
    mesh.settle()
    (device,) = pc(mesh, "a").snapshot.devices
    pc(mesh, "a").snapshot = replace(pc(mesh, "a").snapshot, devices=(replace(device, cap=Bytes.mib(6000)),))
    mesh.settle()
    assert len(mesh.ready()) == 2, "it may be for a moment only"
    assert mesh.decision.wake_at == mesh.now + 10
    mesh.wait(10)
    assert list(mesh.ready()) == ["mistral-7b"]


def test_a_program_that_wants_more_memory_gets_it_where_the_replica_fits_elsewhere() -> None:
    nodes = [node("a", gpu("a")), node("b", gpu("b"))]
    mesh = PretendMesh(nodes, [Deployment("phi-2")])
    mesh.settle()
    (home,) = mesh.ready()["phi-2"]
    owner = pc(mesh, home.partition("/")[0])
    owner.foreign[DeviceId(home)] = 12 * GIB
    mesh.settle()
    assert mesh.ready()["phi-2"] == [home]
    mesh.now += 10
    decision = mesh.decide()
    assert [move.source for move in decision.moves] == [home]
    assert "to a program that needs more there" in decision.moves[0].gain
    mesh.settle()
    assert mesh.ready()["phi-2"] != [home]
    owner.foreign.clear()
    mesh.wait(500)
    assert mesh.ready()["phi-2"] != [home], "nothing comes back without a gain"


def test_a_program_that_ends_again_moves_nothing() -> None:
    mesh = PretendMesh([node("a", gpu("a")), node("b", gpu("b"))], [Deployment("phi-2")])
    mesh.settle()
    (home,) = mesh.ready()["phi-2"]
    owner = pc(mesh, home.partition("/")[0])
    owner.foreign[DeviceId(home)] = 12 * GIB
    mesh.settle()
    mesh.now += 5
    owner.foreign.clear()
    mesh.wait(100)
    assert mesh.ready()["phi-2"] == [home]
    assert mesh.unloaded == []


def test_a_full_device_that_nobody_else_wants_keeps_its_replicas() -> None:
    mesh = PretendMesh(
        [node("a", gpu("a", free_mib=5500)), node("b", gpu("b"))], [Deployment("mistral-7b", device="a/gpu-0")]
    )
    mesh.settle()
    mesh.wanted = [Deployment("mistral-7b")]
    mesh.wait(500)
    assert mesh.ready() == {"mistral-7b": ["a/gpu-0"]}


# --- making room -----------------------------------------------------------------------------------------------------


def crowded(small: str = "phi-2") -> PretendMesh:
    """`small` sits on the only card that could take the 33B."""
    mesh = PretendMesh([node("a", gpu("a", "RTX 4090")), node("b", gpu("b", "GTX 1660 SUPER"))], [Deployment(small)])
    mesh.run(small, "a/gpu-0")
    mesh.settle()
    assert mesh.ready() == {small: ["a/gpu-0"]}
    mesh.wanted.append(Deployment("deepseek-33b", context=4096, slots=2))
    return mesh


def test_a_healthy_replica_makes_room_for_a_refused_model_after_a_hold_and_with_a_reason() -> None:
    mesh = crowded()
    mesh.settle()
    mesh.wait(59)
    assert mesh.ready() == {"phi-2": ["a/gpu-0"]}
    mesh.now += 1
    decision = mesh.decide()
    (move,) = decision.moves
    assert (move.source, move.target) == ("a/gpu-0", "b/gpu-0")
    assert move.gain.startswith("makes room for deepseek-33b, which fits nowhere else and needs ")
    mesh.obey()
    assert mesh.ready() == {"phi-2": ["a/gpu-0"]}, "it answers until its successor does"
    mesh.settle()
    assert mesh.ready() == {"deepseek-33b": ["a/gpu-0"], "phi-2": ["b/gpu-0"]}


@pytest.mark.parametrize("told", ["measured", "reported"])
def test_a_load_waits_for_one_that_leaves_and_took_more_than_was_estimated(told: str) -> None:
    mesh = crowded("minilm")
    (small,) = mesh.decision.plan.assignments
    alone = PretendMesh([node("a", gpu("a", "RTX 4090"))], mesh.wanted[1:])
    alone.settle()
    (large,) = alone.decision.plan.assignments
    # By its estimate the small one leaves room for the large one, to the byte.
    a = pc(mesh, "a")
    (device,) = a.snapshot.devices
    both = Bytes(small.memory.total + large.memory.total)
    assert both < device.capacity
    a.snapshot = replace(a.snapshot, devices=(replace(device, cap=both),))
    taken = Bytes(small.memory.total + 2**20)
    measured = {measured_key(small, device): taken}
    before = mesh.view
    mesh.view = lambda: replace(before(), measured=measured)  # type: ignore[method-assign]
    mesh.settle()
    mesh.now += 60
    if told == "reported":
        mesh.decide()
        mesh.orders.clear()
        a.replicas[small.replica] = replace(a.replicas[small.replica], taken=taken)
        measured.clear()
    decision = mesh.decide()
    assert [move.replica for move in decision.moves] == [small.replica]
    assert [each.replica for each in decision.orders[NodeId("a")]] == [small.replica]
    mesh.settle()
    assert mesh.ready() == {"deepseek-33b": ["a/gpu-0"], "minilm": ["b/gpu-0"]}


def test_a_pc_that_comes_in_time_costs_no_move() -> None:
    mesh = crowded()
    mesh.wait(30)
    mesh.pcs.update(PretendMesh([node("c", gpu("c", "RTX 4090"))]).pcs)
    mesh.wait(200)
    assert mesh.ready() == {"deepseek-33b": ["c/gpu-0"], "phi-2": ["a/gpu-0"]}


def test_a_large_replica_is_not_moved_for_a_small_one() -> None:
    nodes = [node("a", gpu("a", "RTX 3060", free_mib=5200)), node("b", gpu("b", "RTX 3060"))]
    mesh = PretendMesh(nodes, [Deployment("mistral-7b", device="a/gpu-0")])
    mesh.settle()
    mesh.wanted = [Deployment("mistral-7b"), Deployment("minilm", device="a/gpu-0")]
    mesh.wait(500)
    assert mesh.ready() == {"mistral-7b": ["a/gpu-0"]}


def test_a_move_whose_load_fails_is_given_up() -> None:
    mesh = crowded()
    mesh.fails.add(("phi-2", DeviceId("b/gpu-0")))
    mesh.settle()
    mesh.wait(60)
    assert mesh.ready() == {"phi-2": ["a/gpu-0"]}
    assert mesh.decision.moves == ()


def test_a_deploy_can_ask_whether_room_would_be_made_and_nothing_moves_by_asking() -> None:
    mesh = crowded()
    view = mesh.view()
    assert [refusal.model for refusal in mesh.coordination.preview(view).refusals] == ["deepseek-33b"]
    room = mesh.coordination.room_for(view, "deepseek-33b")
    assert room is not None
    assert [(move.assignment.model, move.device.id) for move in room.moves] == [("phi-2", "b/gpu-0")]
    assert mesh.coordination.room_for(view, "mistral-7b") is None
    mesh.die("b")
    assert mesh.coordination.room_for(mesh.view(), "deepseek-33b") is None
    assert mesh.decide().moves == ()


def test_a_preview_is_what_is_decided_then() -> None:
    mesh = PretendMesh(TWO, [Deployment("mistral-7b"), Deployment("phi-2")])
    previewed = mesh.coordination.preview(mesh.view())
    mesh.settle()
    assert [each.replica for each in mesh.decision.plan.assignments] == [each.replica for each in previewed.assignments]


def test_a_decision_is_given_again_while_nothing_changes_and_no_hold_ends() -> None:
    mesh = crowded()
    mesh.settle()
    mesh.decide()
    first = mesh.decide()
    mesh.now += 1
    assert mesh.decide() is first
    mesh.now = first.wake_at
    assert mesh.decide() is not first


# --- loads that fail -------------------------------------------------------------------------------------------------


def test_a_failed_load_is_tried_on_another_device_and_the_verdict_says_why_not_here() -> None:
    mesh = PretendMesh([node("a", gpu("a")), node("b", gpu("b"))], [Deployment("phi-2")])
    mesh.decide()
    first = mesh.decision.plan.assignments[0].device
    mesh.fails.add(("phi-2", first))
    mesh.settle()
    (home,) = mesh.ready()["phi-2"]
    assert home != first
    verdict = next(each for each in mesh.decision.plan.verdicts["phi-2"] if each.device == first)
    assert verdict.reason == "a load of Q8_0 failed: it is broken"


def test_a_model_that_fails_everywhere_stays_where_it_failed_and_its_pauses_grow() -> None:
    mesh = PretendMesh(TWO, [Deployment("phi-2")])
    mesh.fails |= {("phi-2", DeviceId("pc1/gpu-0")), ("phi-2", DeviceId("pc2/gpu-0"))}
    mesh.settle()
    states = [report.state for each in mesh.pcs.values() for report in each.replicas.values()]
    assert states == [ReplicaState.FAILED]
    tries = []
    for _ in range(6):
        before = len(mesh.unloaded)
        mesh.wait(120)
        tries.append(len(mesh.unloaded) - before)
    assert sum(tries) <= 6
    mesh.fails.clear()
    mesh.wait(3600)
    assert list(mesh.ready()) == ["phi-2"]


def test_a_load_that_failed_is_not_tried_again_where_it_no_longer_fits() -> None:
    mesh = PretendMesh([node("a", gpu("a"))], [Deployment("mistral-7b"), Deployment("minilm")])
    mesh.fails.add(("minilm", DeviceId("a/gpu-0")))
    mesh.settle()
    assert len(mesh.decide().orders[NodeId("a")]) == 2
    pc(mesh, "a").foreign[DeviceId("a/gpu-0")] = 12 * GIB
    assert [each.model for each in mesh.decide().orders[NodeId("a")]] == ["mistral-7b"]
    assert [refusal.model for refusal in mesh.decision.plan.refusals] == ["minilm"]


def test_deploying_again_tries_at_once() -> None:
    mesh = PretendMesh(TWO[:1], [Deployment("phi-2")])
    mesh.fails.add(("phi-2", DeviceId("pc1/gpu-0")))
    mesh.settle()
    mesh.fails.clear()
    mesh.versions["phi-2"] = 1
    mesh.settle()
    assert mesh.ready() == {}, "the first version that is seen is no news"
    mesh.versions["phi-2"] = 2
    mesh.settle()
    assert mesh.ready() == {"phi-2": ["pc1/gpu-0"]}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["a", "b"])
def test_all_else_equal_the_node_that_has_the_file_gets_the_model(holder: str) -> None:
    mesh = PretendMesh([node("a", gpu("a")), node("b", gpu("b"))], [Deployment("phi-2")])
    pc(mesh, holder).files = (HeldFile("phi-2", "Q8_0", Bytes(1)),)
    mesh.settle()
    assert mesh.ready()["phi-2"] == [f"{holder}/gpu-0"]


def test_without_the_hub_only_variants_that_somebody_has_are_planned() -> None:
    mesh = PretendMesh([node("a", gpu("a")), node("b", gpu("b"))], [Deployment("phi-3-mini")], everywhere=False)
    mesh.settle()
    assert mesh.ready() == {}
    assert (
        mesh.decision.plan.refusals[0].remedy == "No node has a file of phi-3-mini. `tars pull phi-3-mini` fetches it."
    )
    pc(mesh, "b").files = (HeldFile("phi-3-mini", "Q4_K_M", Bytes(1)),)
    mesh.settle()
    assert [each.variant for each in mesh.decision.plan.assignments] == ["Q4_K_M"]


def test_a_model_that_one_node_alone_knows_is_planned_for_all() -> None:
    own = replace(MODELS["phi-2"], name="house-model")
    mesh = PretendMesh(TWO, [])
    view = replace(mesh.view(), wishes=(Wish(Deployment("house-model"), own),), hub=False)
    assert Coordination().decide(view).plan.refusals[0].model == "house-model"
    adverts = (replace(view.adverts[0], files=(HeldFile("house-model", "Q8_0", Bytes(1)),)), view.adverts[1])
    told = replace(view, adverts=adverts)
    assert [each.model for each in Coordination().decide(told).plan.assignments] == ["house-model"]


# --- what holds of every decision ------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["die", "back", "drain", "resume", "program", "ended", "fail", "wish", "coordinator", "wait"]),
        st.integers(0, 9),
    ),
    max_size=8,
)


@settings(max_examples=settings().max_examples // 6)
@given(st.integers(0, 10**6), st.floats(0.3, 1.3), EVENTS)
def test_it_comes_to_rest_and_moves_no_healthy_replica_without_a_gain(
    seed: int, fill: float, events: list[tuple[str, int]]
) -> None:
    nodes, wanted = random_fleet(seed, fill=fill)
    mesh = PretendMesh(nodes[:5], wanted[:6])
    mesh.settle()
    names = sorted(mesh.pcs)
    for event, number in events:
        name = names[number % len(names)]
        each = mesh.pcs[name]
        healthy = {
            replica
            for pc in mesh.pcs.values()
            for replica, report in pc.replicas.items()
            if report.state is ReplicaState.READY
        }
        mesh.unloaded.clear()
        match event:
            case "die":
                mesh.die(name)
            case "back":
                each.alive = True
            case "drain" | "resume":
                each.draining = event == "drain"
            case "program":
                each.foreign[each.snapshot.devices[0].id] = number * GIB
            case "ended":
                each.foreign.clear()
            case "fail" if mesh.wanted:
                model = mesh.wanted[number % len(mesh.wanted)].model
                mesh.fails ^= {(model, each.snapshot.devices[0].id)}
            case "wish" if mesh.wanted:
                index = number % len(mesh.wanted)
                mesh.wanted[index] = replace(mesh.wanted[index], replicas=number % 3 + 1)
            case "coordinator":
                mesh.coordination = Coordination()
        mesh.settle()
        unloaded = healthy & set(mesh.unloaded)
        if event in ("coordinator", "fail", "ended", "program", "back"):
            assert not unloaded, f"{event} moved {unloaded}"
        mesh.wait(200)
        assert mesh.decision.moves == ()
    before = mesh.ready()
    mesh.unloaded.clear()
    mesh.wait(50)
    assert (mesh.ready(), mesh.unloaded) == (before, []), "it moves although nothing changed"
