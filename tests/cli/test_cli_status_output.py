"""`tars status`: of a node alone, and of a node in a mesh."""

from __future__ import annotations

from types import SimpleNamespace

from drawing import drawn, row

from tars.cli.status_output import status_view
from tars.messages.node import LoadProgress, RecentError


def test_status_shows_devices_replicas_and_errors(make: SimpleNamespace) -> None:
    node = make.description(
        make.replica(),
        make.replica("loading", LoadProgress(stage="read", percent=40), id="b", model="phi-2"),
        make.replica("failed", None, id="c", model="broken", last_error="not a GGUF file", restarts=2),
        wsl2=True,
        devices=[
            make.device(notes=["WSL2: per-process memory is not available"]),
            make.device("Pretend", simulated=True),
        ],
        recent_errors=[
            RecentError(
                at=9.0 - n, method="inference.chat", error_kind="unknown_model", message="gone", trace_id=f"t{n}"
            )
            for n in range(9)
        ],
    )
    text = drawn(status_view(node, None, 0.0))
    assert "node pc1  ready" in text
    assert "up 2 h 5 min" in text
    assert "WSL2" in text
    assert "47 °C" in row(text, "RTX 3060")
    assert "4.0 GiB" in row(text, "RTX 3060")
    assert "per-process memory is not available" in text
    assert "Pretend (simulated)" in text
    assert "52 tokens/s" in row(text, "mistral-7b-instruct")
    assert "loading: read 40 %" in row(text, "phi-2")
    assert "failed (2 restarts)" in row(text, "broken")
    assert "not a GGUF file" in text
    assert [f"trace t{n}" in text for n in range(6)] == [True] * 5 + [False]  # newest first


def test_status_of_a_node_without_models_says_what_to_do(make: SimpleNamespace) -> None:
    shown = drawn(status_view(make.description(), None, 0.0))
    assert "tars deploy MODEL" in shown
    # A description knows replicas, not deployments: a refused model is deployed, and its line follows.
    assert "no model is loaded" in shown


def test_names_with_brackets_are_shown_and_not_taken_for_markup(make: SimpleNamespace) -> None:
    text = drawn(status_view(make.description(make.replica(model="[bold]m[/bold]"), name="[red]pc"), None, 0.0))
    assert "[bold]m[/bold]" in text
    assert "[red]pc" in text


def test_a_node_alone_looks_the_same_with_and_without_a_word_on_its_mesh(make: SimpleNamespace) -> None:
    node = make.description(make.replica())
    alone = make.mesh(make.mesh_node(this_node=True, name="pc1"))
    assert drawn(status_view(node, alone, 0.0)).split() == drawn(status_view(node, None, 0.0)).split()


def test_in_a_mesh_all_nodes_and_their_replicas_are_shown(make: SimpleNamespace) -> None:
    loading = make.mesh_replica(
        id="b", state="loading", progress=LoadProgress(stage="fetch", percent=40), measured=False
    )
    own = make.mesh_node(
        this_node=True, name="pc1", coordinator=True, replicas=[make.mesh_replica(model="told-before")]
    )
    peer = make.mesh_node(replicas=[make.mesh_replica(model="theirs"), loading], client_url="http://pc2:8000")
    mesh = make.mesh(own, peer, coordinator="pc1")
    text = drawn(status_view(make.description(make.replica()), mesh, 0.0), width=200)
    assert "this node, coordinates" in row(text, "pc1   ALIVE")
    assert row(text, "http://pc2:8000").split()[:2] == ["pc2", "ALIVE"]
    assert "1 ready, 1 loading" in row(text, "http://pc2:8000")
    assert row(text, "theirs").split()[0] == "pc2"
    assert row(text, "mistral-7b-instruct").split()[0] == "pc1"
    assert "loading: fetch 40 %" in row(text, "phi-2")
    assert "told-before" not in text, "this node's own replicas are shown as they are now"
