"""What `mesh.describe` answers, made from what the nodes told of themselves and from how this node sees them.

Law of this file: it chooses and phrases; it asks nobody and decides nothing. Only the nodes that are shown are described in full, however
many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tars.core.coordination_view import Move
from tars.core.records import NodeAdvert, ReplicaReport, TransferReport
from tars.core.types import DeviceId, DeviceSnapshot, NodeId, NodeSnapshot, Plan
from tars.errors import InvalidParams, TarsError
from tars.mesh.plan_report import describe_device, describe_move, describe_verdict
from tars.messages.files import TransferDescription
from tars.messages.mesh_state import (
    MOST_REFUSED,
    MeshDescription,
    MeshNode,
    MeshParams,
    MeshReplica,
    UnservedModel,
)
from tars.messages.node import LoadProgress, PeerDescription

SHORTEST_BEGINNING = 4
"""Characters of an id that name a node, as `tars node remove` takes them."""


def describe_mesh(
    params: MeshParams,
    me: str,
    peers: Sequence[PeerDescription],
    told: Mapping[NodeId, NodeAdvert],
    *,
    plan: Plan,
    moves: Sequence[Move],
    problems: Mapping[str, TarsError],
    isolated: bool = False,
) -> MeshDescription:
    """`peers` are all nodes, `me` among them; `problems` say by model why it, or a part of it, is loaded nowhere.

    Raises `InvalidParams` where `params.node` names no node, or several.
    """
    if params.node is not None:
        chosen = [_named(params.node, peers)]
    else:
        ranked = sorted(peers, key=lambda peer: _rank(peer, me, told.get(NodeId(peer.node))))
        chosen = sorted(ranked[: params.most_nodes], key=lambda peer: (peer.node != me, peer.name, peer.node))
    snapshots = [advert.node for advert in told.values()]
    return MeshDescription(
        nodes=[_node(peer, peer.node == me, told.get(NodeId(peer.node))) for peer in chosen],
        nodes_left_out=0 if params.node is not None else len(peers) - len(chosen),
        nodes_by_state=dict(sorted(Counter(peer.state for peer in peers).items())),
        coordinator=next((peer.name for peer in peers if peer.coordinator), None),
        isolated=isolated,
        moves=[describe_move(move, snapshots) for move in moves],
        unserved=_unserved(plan, problems, snapshots),
    )


def device_names(told: Iterable[NodeAdvert]) -> dict[str, str]:
    """The name of each advertised replica's device, by replica."""
    found: dict[str, str] = {}
    for advert in told:
        names = {device.id: device.name for device in advert.node.devices}
        for report in advert.replicas:
            device = report.assignment.device
            found[report.assignment.replica] = names.get(device, device)
    return found


def _rank(peer: PeerDescription, me: str, advert: NodeAdvert | None) -> tuple[bool, bool, bool, bool, str, str]:
    """Who is worth a place first: this node, the coordinator, whoever is in trouble or serves something; those that left come last."""
    serves = advert is not None and bool(advert.replicas)
    idle = peer.state == "ALIVE" and not serves
    return (peer.node != me, not peer.coordinator, peer.state == "LEFT", idle, peer.name, peer.node)


def _named(given: str, peers: Sequence[PeerDescription]) -> PeerDescription:
    wanted = given.strip()
    begins = wanted.lower() if len(wanted) >= SHORTEST_BEGINNING else None
    for found in (
        [peer for peer in peers if peer.node == wanted],
        [peer for peer in peers if peer.name == wanted],
        [peer for peer in peers if begins is not None and peer.node.startswith(begins)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{peer.node} ({peer.name})" for peer in found[:5])
            raise InvalidParams(f"{len(found)} nodes answer to that: {listed}. Name the one that is meant by its id.")
    raise InvalidParams(
        "The mesh has no node with that id or name. `tars node list` shows them (an id may be cut to its first "
        f"{SHORTEST_BEGINNING} characters or more)."
    )


def _node(peer: PeerDescription, this_node: bool, advert: NodeAdvert | None) -> MeshNode:
    devices = () if advert is None else advert.node.devices
    by_id = {device.id: device for device in devices}
    return MeshNode(
        node=peer.node,
        name=peer.name,
        this_node=this_node,
        state=peer.state,
        since=peer.since,
        coordinator=peer.coordinator,
        version=peer.version if advert is None else advert.version,
        client_url=peer.client_url if advert is None else advert.client_url,
        addresses=peer.addresses,
        devices=[describe_device(device, peer.name) for device in devices],
        replicas=[] if advert is None else [_replica(each, by_id) for each in advert.replicas],
        transfers=[] if advert is None else [_transfer(each) for each in advert.transfers],
    )


def _replica(report: ReplicaReport, devices: Mapping[DeviceId, DeviceSnapshot]) -> MeshReplica:
    assignment = report.assignment
    device = devices.get(assignment.device)
    loading = report.stage is not None and report.percent is not None
    return MeshReplica(
        id=assignment.replica,
        model=assignment.model,
        model_kind=report.kind.value,
        variant=assignment.variant,
        device=assignment.device,
        device_name=assignment.device if device is None else device.name,
        simulated=device is not None and device.simulated,
        state=report.state.value,
        # A peer's percent is its own word: a message's bounds must not refuse the whole mesh for it.
        progress=LoadProgress(stage=report.stage or "", percent=min(100.0, max(0.0, report.percent or 0.0)))
        if loading
        else None,
        memory_bytes=int(assignment.memory.total if report.taken is None else report.taken),
        measured=report.taken is not None,
        speed=report.speed,
        last_error=report.error,
    )


def _transfer(report: TransferReport) -> TransferDescription:
    return TransferDescription(
        model=report.model,
        variant=report.variant,
        stage=report.stage,
        bytes_done=int(report.done),
        bytes_total=int(report.total),
        bytes_per_second=report.bytes_per_second,
        sources=list(report.sources),
        note=report.note,
    )


def _unserved(plan: Plan, problems: Mapping[str, TarsError], nodes: Sequence[NodeSnapshot]) -> list[UnservedModel]:
    verdicts = {refusal.model: refusal.verdicts for refusal in plan.refusals}
    return [
        UnservedModel(
            model=model,
            why=problem.message,
            verdicts=[describe_verdict(verdict, nodes) for verdict in verdicts.get(model, ())],
        )
        for model, problem in sorted(problems.items())[:MOST_REFUSED]
    ]
