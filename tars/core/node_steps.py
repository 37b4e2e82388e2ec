"""What a node does next to hold what it was ordered to hold.

Law of this file: pure and level-triggered: the same state, the same steps, whatever happened before. On one device either one thing loads,
or things are unloaded; a file is copied at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tars.core.coordination_view import same_load
from tars.core.types import Assignment, DeviceId, ReplicaId


@dataclass(frozen=True, slots=True)
class Steps:
    """To do now, in this order."""

    stop: tuple[ReplicaId, ...]
    fetch: tuple[Assignment, ...]
    """Their file is not here yet."""
    start: tuple[Assignment, ...]
    """New ones, and FAILED ones that are due for another try."""


def next_steps(
    orders: Sequence[Assignment],
    held: Mapping[ReplicaId, Assignment],
    moving: Collection[DeviceId],
    *,
    retry_due: Collection[ReplicaId] = (),
    without_file: Collection[ReplicaId] = (),
) -> Steps:
    """`held` has what runs, loads or failed here; `moving` are devices where something loads or ends; `without_file` of the orders."""
    ordered = {each.replica: each for each in orders}
    stop = tuple(
        replica
        for replica, assignment in held.items()
        if replica not in ordered or not same_load(ordered[replica], assignment)
    )
    busy = {*moving, *(held[replica].device for replica in stop)}
    start: list[Assignment] = []
    for assignment in orders:
        here = assignment.replica in held and assignment.replica not in stop
        if here and assignment.replica not in retry_due:
            continue
        if assignment.device in busy or (not here and assignment.replica in without_file):
            continue
        busy.add(assignment.device)
        start.append(assignment)
    fetch = tuple(each for each in orders if each.replica in without_file and each.replica not in held)
    return Steps(stop, fetch, tuple(start))
