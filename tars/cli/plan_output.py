"""Plans, refusals, explanations and deployments as rich renderables.

Law of this file: as `output`'s: messages in, renderables out, nothing printed. Nothing is planned here either; it only puts the planner's
bytes and reasons beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tars.cli.output import cell, device_label, plain, table_of
from tars.core.types import Bytes
from tars.messages.node import (
    AssignmentDescription,
    DeployResult,
    ExplainResult,
    PlanResult,
    RefusalDescription,
    VerdictDescription,
)


def plan_view(plan: PlanResult) -> Group:
    """`tars plan`: one row a replica in the order of the devices, the reasons, then what was refused and what would make it fit."""
    table = table_of(
        "model", "variant", "node", "device", "needed", "free before", "after",
        right=("needed", "free before", "after"),
    )  # fmt: skip
    reasons = []
    for assignment, before in free_before(plan):
        device = next((device for device in plan.devices if device.id == assignment.device), None)
        table.add_row(
            cell(assignment.model),
            cell(assignment.variant),
            cell(assignment.node_name or assignment.node[:8]),
            cell(device_label(assignment.device_name, device is not None and device.simulated)),
            cell(Bytes(assignment.needed_bytes)),
            cell(Bytes(before)),
            cell(Bytes(before - assignment.needed_bytes)),
        )
        # Below the table: beside it, a sentence would be folded into a column of three words.
        reasons.append(Padding(Text(f"{plain(assignment.model)}: {plain(assignment.reason)}"), (0, 0, 0, 2)))
    parts: list[RenderableType] = [table if plan.assignments else Text("nothing is placed")]
    if reasons:
        parts += [Text(), Text("why", style="bold"), *reasons]
    if plan.moves:
        parts += [Text(), Text("moving", style="bold")]
        parts += [
            Padding(Text(f"{plain(f'{move.model}: from {move.source} to {move.target}: {move.gain}')}"), (0, 0, 0, 2))
            for move in plan.moves
        ]
    parts += _idle_devices(plan)
    for refusal in plan.refusals:
        parts += [Text(), refusal_view(refusal)]
    return Group(*parts)


def _idle_devices(plan: PlanResult) -> list[RenderableType]:
    used = {assignment.device for assignment in plan.assignments}
    lines: list[RenderableType] = []
    for device in plan.devices:
        if device.id not in used:
            label = device_label(device.name, device.simulated) + (
                f" of {device.node_name}" if device.node_name else ""
            )
            lines.append(Text(f"  {plain(label)}: {Bytes(device.memory_capacity_bytes)} usable"))
    return [Text(), Text("nothing placed on", style="bold"), *lines] if lines else []


def free_before(plan: PlanResult) -> list[tuple[AssignmentDescription, int]]:
    """Each assignment with the bytes that its device would have free without it: capacity less the other replicas there.

    The same number that the planner's reasons compare with. Order: the devices' order, then the plan's own.
    """
    order = {device.id: place for place, device in enumerate(plan.devices)}
    left = {device.id: device.memory_capacity_bytes for device in plan.devices}
    for assignment in plan.assignments:
        left[assignment.device] = left.get(assignment.device, 0) - assignment.needed_bytes
    ordered = sorted(plan.assignments, key=lambda assignment: order.get(assignment.device, len(order)))
    return [(assignment, left[assignment.device] + assignment.needed_bytes) for assignment in ordered]


def refusal_view(refusal: RefusalDescription) -> Group:
    """A model that fits nowhere: bytes needed against bytes free per device, and the remedy."""
    missing = f" ({refusal.replicas_missing} replicas missing)" if refusal.replicas_missing > 1 else ""
    return Group(
        Text.assemble(("refused ", "bold red"), plain(refusal.model), missing),
        _verdicts_table(refusal.verdicts),
        Text.assemble(("what would help: ", "bold"), plain(refusal.remedy)),
    )


def _verdicts_table(verdicts: Sequence[VerdictDescription]) -> Table:
    table = table_of("  device", "variant", "needed", "free", "verdict", "why", right=("needed", "free"))
    for verdict in verdicts:
        table.add_row(
            cell(f"  {_place(verdict)}"),
            cell(verdict.variant),
            cell(Bytes(verdict.needed_bytes)),
            cell(Bytes(verdict.free_bytes)),
            _accepted(verdict),
            cell(verdict.reason),
        )
    return table


def _place(verdict: VerdictDescription) -> str:
    return device_label(verdict.device_name) + (f" of {verdict.node_name}" if verdict.node_name else "")


def _accepted(verdict: VerdictDescription) -> Text:
    return cell("yes", "green") if verdict.accepted else cell("no", "red")


def explain_view(explanation: ExplainResult) -> Group:
    """`tars explain`: the node's own words, then the bytes of every device beside each other."""
    parts: list[RenderableType] = [Text(plain(explanation.text.rstrip()))]
    if explanation.verdicts:
        table = table_of("device", "variant", "needed", "free", "", right=("needed", "free"))
        for verdict in explanation.verdicts:
            table.add_row(
                cell(_place(verdict)),
                cell(verdict.variant),
                cell(Bytes(verdict.needed_bytes)),
                cell(Bytes(verdict.free_bytes)),
                _accepted(verdict),
            )
        parts += [Text(), table]
    return Group(*parts)


def deploy_view(result: DeployResult) -> Group:
    """`tars deploy`: where the replicas go; loading goes on after the answer."""
    if not result.accepted:
        return Group(Text(f"{plain(result.model)}: not accepted; `tars explain {plain(result.model)}` says why"))
    lines = [
        Text(
            f"{plain(result.model)} {plain(a.variant)} -> {plain(device_label(a.device_name))}"
            + (f" on {plain(a.node_name)}" if a.node_name else "")
            + f", {Bytes(a.needed_bytes)}: {plain(a.reason)}"
        )
        for a in result.assignments
    ]
    return Group(*(lines or [Text(f"{plain(result.model)}: accepted. {plain(result.message)}".rstrip())]))
