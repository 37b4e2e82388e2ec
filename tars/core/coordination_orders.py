"""From a plan to the orders of now: how each node comes nearer to it without a load in hope.

Law of this file: pure and without memory. At most one load a device at a time, and none before its memory is free; an order that means the
same is given in the same words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from tars.core.coordination_view import RUNNING, Move, Scene, same_load
from tars.core.types import Assignment, DeviceId, NodeId, Plan, ReplicaId, ReplicaState


def orders_for(
    scene: Scene, found: Plan, moves: Sequence[Move], again: Collection[ReplicaId]
) -> dict[NodeId, tuple[Assignment, ...]]:
    """By live node: what runs and is planned, what leaves once its successor is ready (`moves`), and the next load of each quiet device.

    `again`: replicas that failed and are ordered anew, once they are gone.
    """
    targets = {each.replica: each for each in found.assignments}
    stays = [each for each in targets.values() if scene.state(each) is not None]
    coming = _coming(scene, targets)
    leaves = [scene.reports[move.replica].assignment for move in moves]
    kept = [*(_as_ordered(each, scene) for each in (*stays, *leaves)), *coming]
    kept = [each for each in kept if each.replica not in again]
    names = {each.replica for each in kept}
    busy = scene.in_motion() | {each.device for each in coming}
    busy |= {
        report.assignment.device
        for replica, report in scene.reports.items()
        if replica not in names and (report.state in RUNNING or report.state is ReplicaState.STOPPING)
    }
    taken: Counter[DeviceId] = Counter()
    for each in kept:
        if scene.state(each) is not ReplicaState.FAILED:
            # What it takes by now: an order's words are of the time when it was given, and one that leaves has no newer ones.
            report, planned = scene.reports.get(each.replica), targets.get(each.replica) or scene.updated(each)
            known = None if report is None else report.taken
            taken[each.device] += planned.memory.total if known is None else known
    for each in _by_urgency(scene, targets.values()):
        if each.replica in names or each.device in busy or each.replica in scene.reports:
            continue
        if taken[each.device] + each.memory.total > scene.devices[each.device].capacity:
            continue
        kept.append(each)
        busy.add(each.device)
    by_node: dict[NodeId, list[Assignment]] = {node.id: [] for node in scene.nodes}
    for each in sorted(kept, key=lambda each: each.replica):
        by_node[each.node].append(each)
    return {node: tuple(assignments) for node, assignments in by_node.items()}


def _coming(scene: Scene, targets: Mapping[ReplicaId, Assignment]) -> list[Assignment]:
    """What was ordered and is not reported yet: the next one of each quiet device, where a PC that was off has everything before it."""
    motion = scene.in_motion()
    first: dict[DeviceId, Assignment] = {}
    for each in _by_urgency(scene, targets.values()):
        ordered = scene.ordered.get(each.replica)
        if ordered is None or each.device in motion or scene.state(each) is not None:
            continue
        if same_load(ordered, each):
            first.setdefault(each.device, ordered)
    return list(first.values())


def _by_urgency(scene: Scene, assignments: Iterable[Assignment]) -> list[Assignment]:
    """What a device loads first: by priority, then models that nobody serves now, then what is there soonest, which is the smallest."""
    served = {report.assignment.model for report in scene.reports.values() if report.state is ReplicaState.READY}

    def key(each: Assignment) -> tuple[int, bool, int, ReplicaId]:
        deployment, _ = scene.wanted[each.model]
        return (-deployment.priority, each.model in served, each.memory.total, each.replica)

    return sorted(assignments, key=key)


def _as_ordered(assignment: Assignment, scene: Scene) -> Assignment:
    """The words of the order in force, or of the report: an order that says the same is not written again."""
    known = scene.ordered.get(assignment.replica)
    if known is not None and same_load(known, assignment):
        return known
    report = scene.reports.get(assignment.replica)
    return assignment if report is None else report.assignment
