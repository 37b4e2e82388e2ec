"""A plan and its devices as messages, and a fleet made from configuration files for `tars plan --node FILE`.

Law of this file: translation only; nothing is planned or worded here.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tars.catalogue import Catalogue
from tars.config import Config, load_config
from tars.core.coordination_view import Move
from tars.core.types import (
    Assignment,
    Deployment,
    DeviceId,
    DeviceSnapshot,
    DeviceVerdict,
    NodeId,
    NodeSnapshot,
    Plan,
    Refusal,
)
from tars.devices.simulated import capped, expected_devices, simulated_devices
from tars.errors import ConfigError
from tars.messages.node import (
    AssignmentDescription,
    DeviceDescription,
    MoveDescription,
    PlanResult,
    RefusalDescription,
    VerdictDescription,
)

NODE_NAMESPACE = uuid.UUID("6a0f0a52-7d0c-5f0e-9d9c-1f4c2f6f3b11")
"""For the ids of nodes that exist only as a file: the same name, the same id, hence the same plan."""


def describe_device(snapshot: DeviceSnapshot, node_name: str = "") -> DeviceDescription:
    """One device as `node.describe` and `mesh.plan` show it; the latter with its node's name."""
    capability = snapshot.compute_capability
    return DeviceDescription(
        id=snapshot.id,
        kind=snapshot.kind.value,
        name=snapshot.name,
        simulated=snapshot.simulated,
        memory_total_bytes=int(snapshot.memory_total),
        memory_free_bytes=int(snapshot.memory_free),
        memory_held_bytes=int(snapshot.memory_held),
        memory_capacity_bytes=int(snapshot.capacity),
        unified_memory=snapshot.unified_memory,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        precision=snapshot.precision.value,
        temperature_celsius=snapshot.temperature_celsius,
        utilisation_percent=snapshot.utilisation_percent,
        power_watts=snapshot.power_watts,
        driver=snapshot.driver,
        notes=list(snapshot.notes),
        node_name=node_name,
    )


def describe_assignment(assignment: Assignment, nodes: Sequence[NodeSnapshot]) -> AssignmentDescription:
    """One planned replica; a node or device that has gone since is named by its id."""
    memory = assignment.memory
    devices = {device.id: device.name for node in nodes for device in node.devices}
    return AssignmentDescription(
        replica=assignment.replica,
        model=assignment.model,
        variant=assignment.variant,
        node=assignment.node,
        node_name=next((node.name for node in nodes if node.id == assignment.node), ""),
        device=assignment.device,
        device_name=devices.get(assignment.device, assignment.device),
        needed_bytes=int(memory.total),
        weights_bytes=int(memory.weights),
        kv_cache_bytes=int(memory.kv_cache),
        compute_bytes=int(memory.compute),
        overhead_bytes=int(memory.overhead),
        measured=memory.measured is not None,
        context=assignment.settings.context,
        slots=assignment.settings.slots,
        kv_tokens=assignment.settings.kv_tokens,
        gpu_layers=assignment.settings.gpu_layers,
        reason=assignment.reason,
    )


def describe_verdict(verdict: DeviceVerdict, nodes: Sequence[NodeSnapshot] = ()) -> VerdictDescription:
    """Why a model went, or did not go, to one device, and whose that is."""
    return VerdictDescription(
        device=verdict.device,
        device_name=verdict.device_name,
        variant=verdict.variant,
        accepted=verdict.accepted,
        needed_bytes=int(verdict.needed),
        free_bytes=int(verdict.free),
        reason=verdict.reason,
        node_name=_owners(nodes).get(verdict.device, ""),
    )


def _owners(nodes: Sequence[NodeSnapshot]) -> dict[DeviceId, str]:
    return {device.id: node.name for node in nodes for device in node.devices}


def describe_move(move: Move, nodes: Sequence[NodeSnapshot]) -> MoveDescription:
    """A replica on its way."""
    places = {device.id: f"{device.name} of {node.name}" for node in nodes for device in node.devices}
    return MoveDescription(
        replica=move.replica,
        successor=move.successor,
        model=move.model,
        source=places.get(move.source, move.source),
        target=places.get(move.target, move.target),
        gain=move.gain,
    )


def describe_refusal(refusal: Refusal, nodes: Sequence[NodeSnapshot] = ()) -> RefusalDescription:
    """A model that fits nowhere, and what would help."""
    return RefusalDescription(
        model=refusal.model,
        replicas_missing=refusal.replicas_missing,
        remedy=refusal.remedy,
        verdicts=[describe_verdict(verdict, nodes) for verdict in refusal.verdicts],
    )


def plan_result(plan: Plan, nodes: Sequence[NodeSnapshot], moves: Sequence[Move] = ()) -> PlanResult:
    """`mesh.plan`'s answer."""
    return PlanResult(
        assignments=[describe_assignment(assignment, nodes) for assignment in plan.assignments],
        refusals=[describe_refusal(refusal, nodes) for refusal in plan.refusals],
        devices=[describe_device(device, node.name) for node in nodes for device in node.devices],
        moves=[describe_move(move, nodes) for move in moves],
    )


# --- a fleet that is not there --------------------------------------------------------------------------------------


def fleet_from_configs(
    paths: Sequence[Path], *, environment: Mapping[str, str] | None = None
) -> tuple[list[NodeSnapshot], list[Deployment], Catalogue]:
    """Nodes, deployments and catalogue of configuration files: their expected and simulated devices, their [[deploy]] and [[model]].

    Raises `ConfigError` for a file that cannot be used, that declares no device, and for two files of one node name. Of two
    deployments of one model the planner takes the larger: they are wishes of one fleet, not of one PC.
    """
    configs = [(path, load_config(path, environment=environment)) for path in paths]
    nodes = [_node_of(path, config) for path, config in configs]
    names = [node.name for node in nodes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two files describe a node called {name}: give each its own name under [node].")
    models = {source.name: source for _, config in configs for source in config.model}
    catalogue = Catalogue.load(extra=list(models.values()))
    return nodes, [deployment for _, config in configs for deployment in config.deployments], catalogue


def _node_of(path: Path, config: Config) -> NodeSnapshot:
    node = NodeId(str(uuid.uuid5(NODE_NAMESPACE, config.node.name)))
    declared = (*expected_devices(node, config.devices), *simulated_devices(node, config.devices, {}))
    devices = tuple(capped(device, config.devices) for device in declared)
    if not devices:
        raise ConfigError(
            f"{path} does not say what the PC has, so nothing can be planned for it. Add for each GPU, for example:\n\n"
            '    [[devices.expected]]\n    name = "NVIDIA GeForce RTX 3060"\n    memory_mib = 11909\n'
            '    compute_capability = "8.6"'
        )
    return NodeSnapshot(id=node, name=config.node.name, devices=devices, priority=config.node.priority)
