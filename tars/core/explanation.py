"""A plan's reasons for one model as a few readable lines: `tars plan --explain`, `mesh.explain`.

Law of this file: pure text of what the plan says; it adds no judgement of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from tars.core.coordination_view import Move
from tars.core.types import Assignment, DeviceId, DeviceVerdict, NodeSnapshot, Plan


def explain(model: str, plan: Plan, nodes: Sequence[NodeSnapshot], moves: Sequence[Move] = ()) -> str:
    """Where the model's replicas are and why, what moves, why not elsewhere, and what would make missing ones fit."""
    names = {node.id: node.name for node in nodes}
    homes = {device.id: (device.name, names[node.id]) for node in nodes for device in node.devices}
    lines: list[str] = []
    alike: dict[tuple[str, str, str], list[Assignment]] = {}
    for assignment in plan.assignments:
        if assignment.model == model:
            alike.setdefault((assignment.device, assignment.variant, assignment.reason), []).append(assignment)
    for same in alike.values():
        assignment = same[0]
        device, node = homes.get(assignment.device, (assignment.device, assignment.node))
        copies = "is" if len(same) == 1 else f"has {len(same)} replicas"
        lines.append(f"{model} ({assignment.variant}) {copies} on {device} of {node}: {assignment.reason}.")
        lines.append(f"  {_parts(assignment)}")
    for move in moves:
        if move.model == model:
            source, target = (" of ".join(homes.get(each, (each, ""))) for each in (move.source, move.target))
            lines.append(f"{model} moves from {source} to {target}, where it is loaded first: {move.gain}.")
    refusal = next((each for each in plan.refusals if each.model == model), None)
    if refusal is not None:
        count = "1 replica fits" if refusal.replicas_missing == 1 else f"{refusal.replicas_missing} replicas fit"
        lines.append(f"{model}: {count} nowhere{' else' if lines else ''}.")
    others = [verdict for verdict in plan.verdicts.get(model, ()) if not verdict.accepted]
    if others:
        lines.append("Not elsewhere, because:" if alike else "Device by device:")
        lines += [f"  {_where(verdict, homes)}: {verdict.reason}{_numbers(verdict)}" for verdict in others]
    if refusal is not None and refusal.remedy:
        lines.append(f"What would help: {refusal.remedy}")
    return "\n".join(lines) if lines else f"{model} is not deployed: no plan has been asked about it."


def _parts(assignment: Assignment) -> str:
    """What the bytes of one replica are made of."""
    memory, settings = assignment.memory, assignment.settings
    if settings.shares_kv:
        context = f"{settings.slots} slots of up to {settings.context} tokens share {settings.kv_tokens}"
    else:
        context = f"{settings.context} tokens" + (f" in each of {settings.slots} slots" if settings.slots > 1 else "")
    if memory.measured is not None:
        return f"{memory.measured} measured at its last load; {context}"
    cache = f", KV cache {memory.kv_cache}" if memory.kv_cache else ""
    return f"weights {memory.weights}{cache}, buffers {memory.compute}, process {memory.overhead}; {context}"


def _where(verdict: DeviceVerdict, homes: dict[DeviceId, tuple[str, str]]) -> str:
    device, node = homes.get(verdict.device, (verdict.device_name, ""))
    return f"{device} of {node}" if node else device


def _numbers(verdict: DeviceVerdict) -> str:
    """Bytes needed against bytes free, where the reason does not say them already."""
    if str(verdict.needed) in verdict.reason:
        return ""
    return f" ({verdict.variant} needs {verdict.needed}, {verdict.free} free)"
