"""The mesh in `tars status`."""

from __future__ import annotations

from types import SimpleNamespace

from drawing import drawn, row

from tars.cli import mesh_output
from tars.messages.files import TransferDescription
from tars.messages.mesh_state import UnservedModel
from tars.messages.node import MoveDescription, VerdictDescription

NOW = 1_000_000.0
GIB = 2**30


def test_a_node_is_one_line_with_the_sum_of_its_devices(make: SimpleNamespace) -> None:
    node = make.mesh_node(devices=[make.device(), make.device(id="n2/gpu-1")])
    line = row(drawn(mesh_output.nodes_table(make.mesh(node), NOW)), "pc2")
    assert "8.0 GiB  12.0 GiB  24.0 GiB" in line


def test_a_node_that_is_gone_holds_nothing_and_says_since_when(make: SimpleNamespace) -> None:
    dead = make.mesh_node(state="DEAD", since=NOW - 125, replicas=[make.mesh_replica()])
    line = row(drawn(mesh_output.nodes_table(make.mesh(dead), NOW)), "pc2")
    assert "DEAD for 2 min" in line
    assert "GiB" not in line
    assert "ready" not in line
    assert mesh_output.peers_replicas(make.mesh(dead)) == []


def test_nodes_that_are_left_out_are_counted(make: SimpleNamespace) -> None:
    mesh = make.mesh(make.mesh_node(), nodes_left_out=950, nodes_by_state={"ALIVE": 998, "DEAD": 2})
    text = drawn(mesh_output.nodes_table(mesh, NOW))
    assert "and 950 more (998 ALIVE, 2 DEAD in all)" in text
    assert "its own network" not in text


def test_a_node_that_is_cut_off_says_so(make: SimpleNamespace) -> None:
    mesh = make.mesh(make.mesh_node(this_node=True), make.mesh_node(state="DEAD"), isolated=True)
    assert "look first at its own network" in drawn(mesh_output.nodes_table(mesh, NOW))


def test_only_other_nodes_make_a_mesh(make: SimpleNamespace) -> None:
    assert not mesh_output.is_mesh(None)
    assert not mesh_output.is_mesh(make.mesh(make.mesh_node(this_node=True)))
    assert mesh_output.is_mesh(make.mesh(make.mesh_node(this_node=True), make.mesh_node(state="DEAD")))


def test_replicas_of_nodes_that_are_gone_are_no_replicas(make: SimpleNamespace) -> None:
    dead = make.mesh_node(state="LEFT", replicas=[make.mesh_replica()])
    mesh = make.mesh(make.mesh_node(this_node=True), dead)
    assert "phi-2" not in drawn(mesh_output.replicas_table(make.description(), mesh))


def test_transfers_moves_and_what_nobody_serves_are_said_with_their_reasons(make: SimpleNamespace) -> None:
    transfer = TransferDescription(
        model="mistral", variant="Q4_K_M", stage="fetch", bytes_done=GIB, bytes_total=4 * GIB, bytes_per_second=1e8,
        sources=["pc1"],
    )  # fmt: skip
    move = MoveDescription(
        replica="a", successor="b", model="phi-2", source="card of pc2", target="card of pc1", gain="pc2 is drained"
    )
    verdicts = [
        VerdictDescription(
            device=f"d{n}", device_name=f"card {n}", variant="Q4_K_M", accepted=False, needed_bytes=40 * GIB,
            free_bytes=24 * GIB, reason="too small", node_name="pc2",
        )
        for n in range(9)
    ]  # fmt: skip
    unserved = UnservedModel(model="llama", why="llama fits on no device here.", verdicts=verdicts)
    mesh = make.mesh(make.mesh_node(transfers=[transfer]), moves=[move], unserved=[unserved])
    text = drawn(mesh_output.changes_view(mesh))
    assert "to pc2: mistral Q4_K_M: 1.0 GiB of 4.0 GiB, 95 MiB/s from pc1" in text
    assert "phi-2: card of pc2 -> card of pc1: pc2 is drained" in text
    assert "llama fits on no device here." in text
    assert "card 7 of pc2: Q4_K_M needs 40.0 GiB, 24.0 GiB free" in text
    assert "card 8" not in text
    assert "and 1 more devices" in text
    assert drawn(mesh_output.changes_view(make.mesh(make.mesh_node()))).strip() == ""


def test_one_node_is_shown_with_its_devices_and_replicas(make: SimpleNamespace) -> None:
    failed = make.mesh_replica(id="b", model="broken", state="failed", last_error="not a GGUF file", speed=None)
    node = make.mesh_node(replicas=[make.mesh_replica(), failed], client_url="http://pc2:8000", since=NOW - 60)
    text = drawn(mesh_output.one_node_view(node, NOW))
    assert "node pc2  ALIVE for 1 min  TARS 0.1.0" in text
    assert "192.0.2.2:8001" in text
    assert "http://pc2:8000" in text
    assert "█" in row(text, "RTX 3060")
    assert "33 tokens/s" in row(text, "phi-2")
    assert "not a GGUF file" in text
    gone = drawn(mesh_output.one_node_view(node.model_copy(update={"state": "DEAD"}), NOW))
    assert "It is gone; this is what it told last." in gone
    new = drawn(mesh_output.one_node_view(make.mesh_node(devices=[]), NOW))
    assert "nothing was heard of its devices yet" in new


def test_names_from_peers_drive_no_terminal(make: SimpleNamespace) -> None:
    evil = "\x1b]0;owned\x07[bold]pc"
    replica = make.mesh_replica(model=evil, device_name=evil, last_error=evil, state="failed")
    transfer = TransferDescription(
        model=evil, variant=evil, stage="fetch", bytes_done=0, bytes_total=1, bytes_per_second=0, sources=[evil]
    )
    node = make.mesh_node(
        name=evil, version=evil, client_url=evil, replicas=[replica], addresses=[evil], transfers=[transfer]
    )
    move = MoveDescription(replica="a", successor="b", model=evil, source=evil, target=evil, gain=evil)
    mesh = make.mesh(node, moves=[move], unserved=[UnservedModel(model=evil, why=evil, verdicts=[])])
    for view in (
        mesh_output.nodes_table(mesh, NOW),
        mesh_output.replicas_table(make.description(), mesh),
        mesh_output.changes_view(mesh),
        mesh_output.one_node_view(node, NOW),
    ):
        text = drawn(view)
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[bold]" in text
