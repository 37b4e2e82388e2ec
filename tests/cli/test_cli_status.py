"""`tars status` asks for the mesh too, and for one node of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tars.errors import InvalidParams
from tars.messages.node import DeployResult, ModelsResult


@pytest.fixture
def meshed(node: Any, make: SimpleNamespace) -> Any:
    """The fake node, in a mesh with pc2."""
    own, peer = make.mesh_node(this_node=True, name="pc1"), make.mesh_node(replicas=[make.mesh_replica()])
    node.answers |= {
        "node.describe": make.description(make.replica()),
        "models.list": ModelsResult(models=[make.model(deployed=True, state="ready")]),
        "mesh.describe": lambda params: make.mesh(peer) if params.get("node") else make.mesh(own, peer),
    }
    return node


def test_status_shows_the_mesh_and_json_has_it_beside_the_node(meshed: Any, tars: Callable[..., Any]) -> None:
    ran = tars("status")
    assert ran.code == 0, ran.err
    assert "pc2" in ran.out
    assert "phi-2" in ran.out
    document = orjson.loads(tars("status", "--json").out)
    assert document["name"] == "pc1"
    assert [each["name"] for each in document["mesh"]["nodes"]] == ["pc1", "pc2"]


def test_of_a_node_that_knows_no_mesh_the_json_is_its_description(
    meshed: Any, tars: Callable[..., Any], make: SimpleNamespace
) -> None:
    del meshed.answers["mesh.describe"]
    assert orjson.loads(tars("status", "--json").out) == make.description(make.replica()).model_dump(mode="json")
    assert "pc2" not in tars("status").out


def test_one_node_is_asked_for_by_name(meshed: Any, tars: Callable[..., Any]) -> None:
    ran = tars("status", "--node", "pc2")
    assert ran.code == 0
    assert meshed.params("mesh.describe")["node"] == "pc2"
    assert ran.out.startswith("node pc2")
    assert "pc1" not in ran.out
    assert [each["name"] for each in orjson.loads(tars("status", "--node", "pc2", "--json").out)["nodes"]] == ["pc2"]
    meshed.answers["mesh.describe"] = InvalidParams("The mesh has no node with that id or name.")
    ran = tars("status", "--node", "nobody")
    assert (ran.code, ran.out) == (1, "")
    assert "no node with that id or name" in ran.err


@pytest.mark.parametrize("other", ["--watch", "--wait"])
def test_one_node_is_neither_watched_nor_waited_for(meshed: Any, tars: Callable[..., Any], other: str) -> None:
    assert tars("status", "--node", "pc2", other).code == 2


def test_deploying_waits_for_the_replica_wherever_it_is(
    meshed: Any, tars: Callable[..., Any], make: SimpleNamespace
) -> None:
    meshed.answers["models.deploy"] = DeployResult(model="phi-2", accepted=True, assignments=[])
    assert tars("deploy", "phi-2", "--wait").code == 0
    broken = make.mesh_node(replicas=[make.mesh_replica(state="failed", last_error="bad file")])
    meshed.answers["mesh.describe"] = make.mesh(make.mesh_node(this_node=True), broken)
    assert tars("deploy", "phi-2", "--wait").code == 1
