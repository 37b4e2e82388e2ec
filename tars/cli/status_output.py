"""`tars status` as a whole: the node that was asked, and what it sees of its mesh.

Law of this file: that of `output`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tars.cli.mesh_output import changes_view, is_mesh, nodes_table, peers_replicas, replicas_table
from tars.cli.output import (
    STATE_STYLES,
    cell,
    device_label,
    devices_table,
    duration,
    plain,
    replica_progress,
    speed_of,
    state_cell,
    table_of,
    transfer_progress,
)
from tars.core.types import Bytes
from tars.messages.mesh_state import MeshDescription
from tars.messages.node import NodeDescription, ReplicaDescription

SHOWN_ERRORS = 5
"""Recent errors: the newest ones, few enough that the models stay in view."""


def status_view(node: NodeDescription, mesh: MeshDescription | None, now: float) -> Group:
    """`tars status`: the node, its devices with memory bars, its replicas with load progress, recent errors; and its mesh.

    `now` is Unix time, seconds.
    """
    head = Text.assemble(
        ("node ", "bold"),
        plain(node.name),
        ("  ", ""),
        state_cell(node.state),
        f"  TARS {plain(node.version)}, up {duration(node.uptime_seconds)}, {plain(node.platform)}"
        + (", WSL2" if node.wsl2 else ""),
    )
    calls = Text(f"calls {node.calls.total}, failed {node.calls.failed}, running {node.calls.active}")
    parts: list[RenderableType] = [head, calls, Text()]
    others = mesh if is_mesh(mesh) else None
    if others is not None:
        parts += [nodes_table(others, now), Text()]
    parts.append(devices_table(node.devices))
    notes = [Text(f"  {plain(d.name)}: {plain(note)}", style="dim") for d in node.devices for note in d.notes]
    parts += notes
    parts.append(Text())
    if others is not None and (node.replicas or peers_replicas(others)):
        parts.append(replicas_table(node, others))
    elif node.replicas:
        parts.append(_own_replicas_table(node.replicas))
    else:
        parts.append(Text("no model is loaded; `tars models` lists what can be, `tars deploy MODEL` deploys one"))
    if node.transfers:
        parts += [Text(), Text("model files on their way", style="bold")]
        parts += [
            Text(f"  {plain(each.model)} {plain(each.variant)}: {transfer_progress(each)}") for each in node.transfers
        ]
    if mesh is not None:
        parts.append(changes_view(mesh))
    if node.recent_errors:
        parts += [Text(), Text("recent errors", style="bold")]
        parts += [
            Text(f"  {plain(error.method)}: {plain(error.error_kind)}: {plain(error.message)} (trace {error.trace_id})")
            for error in node.recent_errors[:SHOWN_ERRORS]  # newest first
        ]
    return Group(*parts)


def _own_replicas_table(replicas: Sequence[ReplicaDescription]) -> Table:
    table = table_of(
        "model", "kind", "variant", "device", "state", "memory", "calls", "speed", right=("memory", "calls")
    )
    for replica in replicas:
        memory = (
            str(Bytes(replica.info.memory_bytes)) if replica.info else f"about {Bytes(replica.estimated_bytes)} planned"
        )
        state = cell(replica_progress(replica), STATE_STYLES.get(replica.state, ""))
        if replica.restarts:
            state.append(f" ({replica.restarts} restarts)")
        if replica.last_error and replica.state != "ready":
            state.append(f"\n{plain(replica.last_error)}", style="red")
        table.add_row(
            cell(replica.model),
            cell(replica.model_kind),
            cell(replica.variant),
            cell(device_label(replica.device_name, replica.simulated)),
            state,
            cell(memory),
            cell(replica.calls_total),
            cell(speed_of(replica)),
        )
    return table
