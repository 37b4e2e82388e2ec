"""What must hold: at every step, and once everything is healed and quiet. A `Breach` says what does not.

Law of this file: it looks, and changes nothing. What the operators did is kept here too (`OperatorsWrites`), so that what the mesh believes
in the end can be compared with it: of the writes that some disk still has, the last one by its stamp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from breach import Breach
from virtual_fleet import MOST_ERROR
from virtual_node import VirtualNode

from tars.core.advert_changes import differs
from tars.core.coordination_view import CoordinationView, Decision
from tars.core.mesh_messages import MemberState, Record
from tars.core.placement import plan
from tars.core.placement_cost import cost_on, wanted_variants
from tars.core.records import NodeAdvert, ReplicaReport
from tars.core.replicated_map import DEPLOYMENT, NODE, adverts, wishes
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceSnapshot,
    NodeId,
    ReplicaState,
    RuntimeSettings,
)

LOADING = (ReplicaState.STARTING, ReplicaState.LOADING)


# --- what the operators did ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Write:
    """One deploy or remove. `lost` once the last disk that had it, or something later for its key, is gone: it may come back, or not."""

    record: Record
    lost: bool = False


class OperatorsWrites:
    """Every write of a deployment, by key."""

    def __init__(self) -> None:
        self._writes: dict[str, list[Write]] = {}

    def note(self, record: Record) -> None:
        self._writes.setdefault(record.key, []).append(Write(record))

    def disk_lost(self, lost: VirtualNode, others: Iterable[VirtualNode]) -> None:
        """What only `lost` knew is gone with it."""
        others = list(others)
        for key, writes in self._writes.items():
            for write in writes:
                if not any(_knows(node, key, write.record) for node in others):
                    write.lost = True

    def check(self, node: VirtualNode) -> None:
        """The node believes what was written last."""
        for key, writes in self._writes.items():
            certain = max((write.record.stamp for write in writes if not write.lost), default=None)
            record = node.map.record(key)
            if record is None:
                if certain is not None:
                    raise Breach(f"{node.name} lost {key}")
                continue
            if certain is not None and record.stamp < certain:
                raise Breach(f"{node.name} believes of {key} what was overwritten: {record.stamp} instead of {certain}")
            if not any(write.record == record for write in writes):
                raise Breach(f"{node.name} believes of {key} what nobody wrote: {record}")
        for key, _ in node.map.items(DEPLOYMENT):
            if key not in self._writes:
                raise Breach(f"{node.name} believes in {key}, which nobody deployed")


def _knows(node: VirtualNode, key: str, record: Record) -> bool:
    """On its disk: what a process only remembers can still be lost with it."""
    known = node.disk.records.get(key)
    return known is not None and known.stamp >= record.stamp


# --- every decision -----------------------------------------------------------------------------------------------------


def check_decision(view: CoordinationView, before: Decision | None, decision: Decision) -> None:
    """Orders stay within what devices can hold, begin one load a device at most, and move nothing healthy without a reason."""
    devices = {device.id: device for advert in view.adverts for device in advert.node.devices}
    draining = {advert.node.id for advert in view.adverts if advert.node.draining}
    ready = {
        report.assignment.replica: report.assignment
        for advert in view.adverts
        for report in advert.replicas
        if report.state is ReplicaState.READY
    }
    reported = {report.assignment.replica: report for advert in view.adverts for report in advert.replicas}
    ordered = {each.replica: each for assignments in decision.orders.values() for each in assignments}
    before_orders = {each.replica for orders in view.orders.values() for each in orders.assignments}
    if stray := [each for each in ordered.values() if each.device not in devices]:
        raise Breach(f"orders for {stray[0].device}, which nobody alive has")
    for device, known in devices.items():
        here = [each for each in ordered.values() if each.device == device]
        fresh = [each.replica for each in here if each.replica not in reported and each.replica not in before_orders]
        _check_device(known, [_bytes(each, reported.get(each.replica)) for each in here], begins=bool(fresh))
        loading = [
            each.replica for each in here if each.replica in reported and reported[each.replica].state in LOADING
        ]
        if fresh and len(fresh) + len(loading) > 1:
            raise Breach(f"orders begin more than one load at once on {device}: {', '.join(sorted(fresh + loading))}")
    wanted = {wish.deployment.model: wish.deployment for wish in view.wishes}
    moved = {move.replica: move for move in decision.moves}
    if before is not None:
        moved = {**{move.replica: move for move in before.moves}, **moved}
    for replica, assignment in ready.items():
        if replica in ordered or assignment.node not in decision.orders or assignment.node in draining:
            continue
        if replica not in before_orders:
            continue  # nobody had ordered it: a leftover of another coordinator, or it was ordered away before
        deployment = wanted.get(assignment.model)
        if deployment is None:
            continue
        elsewhere = [each for each in ordered.values() if each.model == assignment.model]
        if len(elsewhere) >= deployment.replicas:
            # Enough of them are ordered without it: it was one too many, or it was moved.
            healthy = [each for each in elsewhere if each.replica in ready]
            if len(healthy) >= deployment.replicas:
                continue
        move = moved.get(replica)
        if move is not None:
            if not move.gain.strip():
                raise Breach(f"{replica} moves to {move.target} without a stated gain")
        elif _still_good(view, devices[assignment.device], assignment, deployment):
            raise Breach(f"{replica} is healthy and wanted, and ordered away without a stated gain")


def _still_good(view: CoordinationView, device: DeviceSnapshot, assignment: Assignment, deployment: Deployment) -> bool:
    """Whether the deployment still asks for this very replica, and its device can hold all that is on it."""
    entry = view.models[assignment.model]
    variant = next((each for each in wanted_variants(entry, deployment) if each.name == assignment.variant), None)
    if variant is None or (deployment.device is not None and not device.is_called(deployment.device)):
        return False
    cost = cost_on(device, entry, variant, deployment, view.measured)
    if _asked_for(cost.settings) != _asked_for(assignment.settings):
        return False
    here = [
        report.assignment.memory.total if report.taken is None else report.taken
        for advert in view.adverts
        for report in advert.replicas
        if report.assignment.device == device.id and report.state is ReplicaState.READY
    ]
    return sum(here) <= device.capacity


def _asked_for(settings: RuntimeSettings) -> tuple[object, ...]:
    return (settings.context, settings.slots, settings.kv_tokens, settings.kv_type, settings.gpu_layers)


def _bytes(assignment: Assignment, report: ReplicaReport | None) -> int:
    """What a replica takes by the best knowledge: an order's words are of the time when it was given."""
    return assignment.memory.total if report is None or report.taken is None else report.taken


def _check_device(device: DeviceSnapshot, taken: Sequence[int], *, begins: bool) -> None:
    """What is to be there fits; where a load begins, beside foreign programs too. What runs may have taken more than was estimated."""
    total = sum(taken)
    most = device.capacity if begins else (device.memory_total - device.reserve) * (1 + MOST_ERROR)
    if total > most:
        raise Breach(f"orders over-commit {device.id}: {Bytes(total)} of {Bytes(int(most))}")


# --- in the end ---------------------------------------------------------------------------------------------------------


def why_not_settled(nodes: Sequence[VirtualNode]) -> str | None:
    """Why the nodes do not agree yet, or do not hold what they could, as a sentence; None where they do."""
    up = [node for node in nodes if node.up and not node.removed]
    if not up:
        return None
    expected = {node.id: _expected(node, up) for node in nodes}
    for node in up:
        if (why := _why_view_differs(node, up, nodes, expected)) is not None:
            return why
    first = up[0]
    for node in up[1:]:
        if node.map.root != first.map.root:
            keys = sorted(
                key
                for key in {record.key for each in (first, node) for record in each.map.records()}
                if first.map.record(key) != node.map.record(key)
            )
            return f"{first.name} and {node.name} know different things: {', '.join(keys[:4])}"
    return why_not_placed(up)


def _expected(node: VirtualNode, up: Sequence[VirtualNode]) -> MemberState | None:
    if node.removed:
        return None
    if node.up:
        return MemberState.DRAINING if node.draining else MemberState.ALIVE
    if node.left or (node.ever_left and all(_sees_left(each, node) for each in up)):
        return MemberState.LEFT  # or it came back, and broke before anybody heard of it
    return MemberState.DEAD


def _sees_left(observer: VirtualNode, node: VirtualNode) -> bool:
    seen = observer.machine.view().members.get(node.id)
    return seen is not None and seen.state is MemberState.LEFT


def _why_view_differs(
    node: VirtualNode,
    up: Sequence[VirtualNode],
    nodes: Sequence[VirtualNode],
    expected: dict[NodeId, MemberState | None],
) -> str | None:
    view = node.machine.view()
    members = node.world.ever
    for other, seen in view.members.items():
        if other not in members:
            return f"{node.name} sees a ghost: {other}"
        wanted = expected.get(other, MemberState.DEAD)
        if wanted is MemberState.LEFT and seen.state is MemberState.DEAD:
            continue  # its good-bye was lost: to be dead is as good
        if seen.state is not wanted:
            return f"{node.name} sees {node.world.name_of(other)} as {seen.state}, and it is {wanted}"
    missing = [other.name for other in up if other is not node and other.id not in view.members]
    if missing:
        return f"{node.name} does not see {missing[0]}"
    best = min(up, key=lambda each: (each.draining, -each.pc.priority, each.id))
    if view.coordinator != best.id:
        return f"{node.name} takes {node.world.name_of(view.coordinator)} for the coordinator, and it is {best.name}"
    if view.isolated and len(up) > 1:
        return f"{node.name} takes itself for cut off"
    return None


def why_not_placed(up: Sequence[VirtualNode]) -> str | None:
    """Why what runs is not what the planner would have, as a sentence; None where it is."""
    moving = [
        each
        for node in up
        for each in node.executor.all()
        # A load for which other programs leave too little is tried again and again, and its state says so.
        if each.state is not ReplicaState.READY and not node.executor.short_of_memory(each)
    ]
    if moving:
        return f"{moving[0].assignment.replica} is {moving[0].state}"
    running = [each.assignment for node in up for each in node.executor.all()]
    coordinator = next(node for node in up if node.coordinator == node.id)
    # What the devices hold now, not what was told of them.
    told = [node.advert() for node in up]
    wanted = [wish.deployment for wish in wishes(coordinator.map).values()]
    view = coordinator.coordination_view(coordinator.advert())
    better = plan([advert.node for advert in told], coordinator.world.models, wanted, running, view.measured, orders=40)
    planned, held = {each.replica for each in better.assignments}, {each.replica for each in running}
    if planned != held:
        return (
            f"the planner would add {', '.join(sorted(planned - held)) or 'nothing'} and end "
            f"{', '.join(sorted(held - planned)) or 'nothing'}"
        )
    for node in up:
        stray = set(adverts(node.map)) - node.world.ever
        if stray:
            return f"{node.name} has the advert of a ghost: {min(stray)}"
        mine = node.map.get(NODE + node.id)
        if not isinstance(mine, NodeAdvert) or differs(mine, node.advert()):
            return f"what the mesh believes of {node.name} is not how it is"
    return None
