"""The mesh as `tars status` shows it: messages in, rich renderables out.

Law of this file: that of `output`; and what a peer said of itself is shown as its own word, of a node that is gone as the past.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tars.cli.output import (
    STATE_STYLES,
    cell,
    device_label,
    devices_table,
    duration,
    plain,
    replica_progress,
    speed_of,
    table_of,
    transfer_progress,
)
from tars.core.types import Bytes
from tars.messages.mesh_state import MeshDescription, MeshNode, MeshReplica
from tars.messages.node import NodeDescription, ReplicaDescription

GONE = frozenset({"DEAD", "LEFT"})
"""States of nodes that hold nothing: what they told last is the past."""
MEMBER_STYLES = {"ALIVE": "green", "DRAINING": "yellow", "SUSPECT": "yellow", "DEAD": "red", "LEFT": "dim"}
ISOLATED = Text("none of the others answers this node: look first at its own network", style="red")
SHOWN_VERDICTS = 8
"""Devices that are named under a model which nobody serves: a mesh of four PCs with a card and a CPU each."""


def is_mesh(mesh: MeshDescription | None) -> bool:
    """Whether there are other nodes."""
    return mesh is not None and len(mesh.nodes) + mesh.nodes_left_out > 1


def peers_replicas(mesh: MeshDescription | None) -> list[MeshReplica]:
    """Of the other nodes that are there."""
    nodes = [] if mesh is None else [each for each in mesh.nodes if not each.this_node and each.state not in GONE]
    return [replica for each in nodes for replica in each.replicas]


def nodes_table(mesh: MeshDescription, now: float) -> Group:
    """One line a node: how it is seen, what it holds; `now` is Unix time, seconds."""
    table = table_of(
        "node", "state", "role", "TARS", "free", "total", "replicas", "page", right=("TARS", "free", "total")
    )
    for node in mesh.nodes:
        there = node.state not in GONE
        state = cell(node.state, MEMBER_STYLES.get(node.state, ""))
        if node.since is not None and node.state != "ALIVE":
            state.append(f" for {duration(max(0.0, now - node.since))}")
        devices = node.devices if there else []
        held, free, total = (
            sum(getattr(device, f"memory_{part}_bytes") for device in devices) for part in ("held", "free", "total")
        )
        roles = [*(["this node"] if node.this_node else []), *(["coordinates"] if node.coordinator else [])]
        table.add_row(
            cell(node.name),
            state,
            cell(", ".join(roles) or "-"),
            *(cell(Bytes(each) if devices else "-") for each in (held, free, total)),
            cell(_counted(node.replicas) if there else "-"),
            cell(node.client_url or "-"),
        )
    parts: list[RenderableType] = [table]
    if mesh.isolated:
        parts.append(ISOLATED)
    if mesh.nodes_left_out:
        states = ", ".join(f"{count} {plain(state)}" for state, count in mesh.nodes_by_state.items())
        parts.append(
            Text(f"and {mesh.nodes_left_out} more ({states} in all); `tars status --node NAME` shows any", style="dim")
        )
    return Group(*parts)


def _counted(replicas: Sequence[MeshReplica]) -> str:
    """`2 ready, 1 loading`."""
    states = [replica.state for replica in replicas]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "-"


def replicas_table(node: NodeDescription, mesh: MeshDescription) -> Table:
    """Every replica of the nodes that are there; this node's own as they are now."""
    table = _replica_columns("node")
    for each in mesh.nodes:
        if each.state in GONE:
            continue
        replicas: Iterable[MeshReplica | ReplicaDescription] = node.replicas if each.this_node else each.replicas
        for replica in replicas:
            table.add_row(cell(each.name), *_replica_cells(replica))
    return table


def _replica_columns(*before: str) -> Table:
    return table_of(*before, "model", "kind", "variant", "device", "state", "memory", "speed", right=("memory",))


def _replica_cells(replica: MeshReplica | ReplicaDescription) -> list[Text]:
    if isinstance(replica, MeshReplica):
        memory, measured = replica.memory_bytes, replica.measured
        unit = "tokens" if replica.model_kind == "chat" else "texts"
        speed = "-" if replica.speed is None else f"{replica.speed:.0f} {unit}/s"
    else:
        measured = replica.info is not None
        memory = replica.estimated_bytes if replica.info is None else replica.info.memory_bytes
        speed = speed_of(replica)
    state = cell(replica_progress(replica), STATE_STYLES.get(replica.state, ""))
    if isinstance(replica, ReplicaDescription) and replica.restarts:
        state.append(f" ({replica.restarts} restarts)")
    if replica.last_error and replica.state != "ready":
        state.append(f"\n{plain(replica.last_error)}", style="red")
    return [
        cell(replica.model),
        cell(replica.model_kind),
        cell(replica.variant),
        cell(device_label(replica.device_name, replica.simulated)),
        state,
        cell(Bytes(memory) if measured else f"about {Bytes(memory)}"),
        cell(speed),
    ]


def changes_view(mesh: MeshDescription) -> Group:
    """Files on their way to peers, what moves, and what nobody serves and why."""
    parts: list[RenderableType] = []
    coming = [
        f"  to {plain(each.name)}: {plain(transfer.model)} {plain(transfer.variant)}: {transfer_progress(transfer)}"
        for each in mesh.nodes
        if each.state not in GONE and not each.this_node
        for transfer in each.transfers
    ]
    if coming:
        parts += [Text(), Text("model files on their way to peers", style="bold"), *map(Text, coming)]
    if mesh.moves:
        parts += [Text(), Text("on the move", style="bold")]
        parts += [
            Text(f"  {plain(move.model)}: {plain(move.source)} -> {plain(move.target)}: {plain(move.gain)}")
            for move in mesh.moves
        ]
    for model in mesh.unserved:
        parts += [Text(), Text.assemble((f"{plain(model.model)} ", "bold red"), plain(model.why))]
        refused = [verdict for verdict in model.verdicts if not verdict.accepted]
        for verdict in refused[:SHOWN_VERDICTS]:
            where = f"{plain(verdict.device_name)}{f' of {plain(verdict.node_name)}' if verdict.node_name else ''}"
            parts.append(
                Text(
                    f"  {where}: {plain(verdict.variant)} needs {Bytes(verdict.needed_bytes)}, {Bytes(verdict.free_bytes)} free"
                )
            )
        if len(refused) > SHOWN_VERDICTS:
            parts.append(Text(f"  and {len(refused) - SHOWN_VERDICTS} more devices"))
    return Group(*parts)


def one_node_view(node: MeshNode, now: float) -> Group:
    """`tars status --node NAME`: what that node told of itself last; `now` is Unix time, seconds."""
    head = Text.assemble(
        ("node ", "bold"),
        plain(node.name),
        "  ",
        cell(node.state, MEMBER_STYLES.get(node.state, "")),
        f"{f' for {duration(max(0.0, now - node.since))}' if node.since is not None else ''}",
        f"  TARS {plain(node.version) or 'of unknown version'}" + (", coordinates" if node.coordinator else ""),
    )
    facts = [
        f"id {plain(node.node)}",
        f"peers reach it at {', '.join(map(plain, node.addresses)) or 'no known address'}",
    ]
    if node.client_url:
        facts.append(f"page {plain(node.client_url)}")
    parts: list[RenderableType] = [head, Text(", ".join(facts), style="dim"), Text()]
    if node.state in GONE:
        parts.append(Text("It is gone; this is what it told last.", style="yellow"))
    if node.devices:
        parts += [devices_table(node.devices), Text()]
    if node.replicas:
        table = _replica_columns()
        for replica in node.replicas:
            table.add_row(*_replica_cells(replica))
        parts.append(table)
    else:
        parts.append(Text("no model is loaded there" if node.devices else "nothing was heard of its devices yet"))
    parts += [
        Text(f"{plain(each.model)} {plain(each.variant)} is on its way: {transfer_progress(each)}")
        for each in node.transfers
    ]
    return Group(*parts)
