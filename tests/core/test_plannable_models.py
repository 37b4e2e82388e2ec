"""Which variants can be planned: those that a node has, runs or can fetch."""

from __future__ import annotations

from dataclasses import replace

from fleets import MODELS, gpu, node

from tars.core.placement import plan
from tars.core.plannable_models import known_models, plannable
from tars.core.records import HeldFile, NodeAdvert, ReplicaReport, Wish
from tars.core.types import Bytes, Deployment, ModelKind, NodeId, ReplicaState

A, B = NodeAdvert(node("a", gpu("a"))), NodeAdvert(node("b", gpu("b")))
WISH = Wish(Deployment("phi-3-mini"))


def variants(*adverts: NodeAdvert, hub: bool = False) -> list[str]:
    found = plannable(MODELS, adverts, [WISH], hub=hub)
    return [each.name for each in found.models["phi-3-mini"].variants] if found.models else []


def test_a_variant_counts_where_a_live_node_has_its_file() -> None:
    assert variants(A, B) == []
    q4 = replace(B, files=(HeldFile("phi-3-mini", "Q4_K_M", Bytes(1)),))
    assert variants(A, q4) == ["Q4_K_M"]
    assert plannable(MODELS, [A, q4], [WISH], hub=False).holders == {"phi-3-mini": {NodeId("b")}}


def test_what_is_loaded_counts_though_its_file_is_away() -> None:
    (assignment,) = plan([A.node], MODELS, [Deployment("phi-3-mini", variant="Q8_0")]).assignments
    loaded = replace(A, replicas=(ReplicaReport(assignment, ModelKind.CHAT, ReplicaState.READY),))
    assert variants(loaded) == ["Q8_0"]


def test_the_hub_gives_what_has_a_place_there() -> None:
    entry = MODELS["phi-3-mini"]
    models = {entry.name: replace(entry, variants=(replace(entry.variants[0], repo="r", file="f"), entry.variants[1]))}
    assert plannable(models, [A], [WISH], hub=False).without_file == models
    found = plannable(models, [A], [WISH], hub=True)
    assert [each.name for each in found.models["phi-3-mini"].variants] == [entry.variants[0].name]


def test_a_nodes_own_entry_and_a_wishs_are_known_to_all() -> None:
    mine, theirs = replace(MODELS["phi-2"], name="mine"), replace(MODELS["phi-2"], name="theirs")
    found = known_models(MODELS, [replace(A, models=(mine,))], [Wish(Deployment("theirs"), theirs)])
    assert {"mine", "theirs", "phi-2"} <= set(found)


def test_of_two_nodes_entries_of_one_name_every_node_takes_the_same() -> None:
    one, other = (replace(MODELS[each], name="mine") for each in ("phi-2", "stablelm-3b"))
    adverts = [replace(A, models=(one,)), replace(B, models=(other,))]
    assert known_models({}, adverts, [])["mine"] == known_models({}, adverts[::-1], [])["mine"] == one


def test_an_alias_is_resolved() -> None:
    held = replace(A, files=(HeldFile("minilm", "fp32", Bytes(1)),))
    assert list(plannable(MODELS, [held], [Wish(Deployment("MINILM-alias"))], hub=False).models) == ["minilm"]
