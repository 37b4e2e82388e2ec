"""The planner: which replica goes on which device, and why; and why not elsewhere.

Law of this file: pure and deterministic, so that every node makes the same plan from the same snapshot. In this order: what is placed and
still valid stays (a healthy replica never moves); missing replicas are searched for (`placement_search`); every (model, device) gets a
verdict and every replica that fits nowhere a refusal with a remedy (`placement_verdicts`). Nothing is ever placed in hope: on every
device the bytes of all assignments stay within `DeviceSnapshot.capacity`, save what is resident already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tars.core.placement_cost import Measured, MeasuredKey, barred, cost_on, measured_key, wanted_variants
from tars.core.placement_search import Ground, Wish, hash_fraction, search
from tars.core.placement_verdicts import Scene, with_reasons
from tars.core.placement_wants import Circumstances, Place, Want, places_of, resolve
from tars.core.types import (
    Assignment,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    ModelKind,
    NodeId,
    NodeSnapshot,
    Plan,
    ReplicaId,
    RuntimeSettings,
)

__all__ = ["Circumstances", "MeasuredKey", "fits", "measured_key", "plan", "replica_id", "still_asked_for"]

ORDERS = 200
"""Orders of replicas that are tried. On random fleets at 80 % fill 200 place as much as CP-SAT's optimum (field notes, Placement)."""
REPLAN_ORDERS = 40
"""Orders for the question whether a plan from nothing would place more: it only words a remedy."""
CPU_STRENGTH = 16
"""By how much a byte of RAM counts less than one of a card when load is spread: DDR4 gives about 40 GB/s where cards give 340 to 1,000."""
RESIDENT = 0.8
"""A device that holds this share of what its replicas were promised has loaded them: estimates err by a few percent, buffers come late."""


def plan(
    nodes: Sequence[NodeSnapshot],
    models: Mapping[str, ModelEntry],
    deployments: Sequence[Deployment],
    current: Sequence[Assignment] = (),
    measured: Measured | None = None,
    *,
    circumstances: Circumstances | None = None,
    orders: int = ORDERS,
) -> Plan:
    """Place `deployments` on `nodes`.

    `current` is what runs or loads now; `DeviceSnapshot.memory_held` is what those hold there (while one loads, give the snapshot from
    before it began, or count what it has taken as held; else its own load looks like a foreign program's). Of two deployments of one
    model the larger counts. A deployment of a model that `models` lacks, by name and alias, is refused.
    """
    measured = {} if measured is None else measured
    known = Circumstances() if circumstances is None else circumstances
    places = places_of(nodes)
    by_model, unknown = resolve(deployments, models)
    wants = [Want(deployment, entry, places, measured, known.bars) for deployment, entry in by_model]
    kept = _keep(wants, places, current, measured, known)
    assignments = [*kept, *_search(wants, places, kept, known, orders)]
    fresh: Mapping[str, int] = {}
    if kept and len(assignments) < sum(want.deployment.replicas for want in wants):
        again = Counter(each.model for each in _search(wants, places, [], known, min(orders, REPLAN_ORDERS)))
        fresh = again if again.total() > len(assignments) else {}
    scene = Scene(wants, places, _ground(places, assignments).free, assignments, known)
    return with_reasons(scene, assignments, {each.replica for each in kept}, unknown, fresh)


# --- what stays -----------------------------------------------------------------------------------------------------


def _keep(
    wants: list[Want], places: list[Place], current: Sequence[Assignment], measured: Measured, known: Circumstances
) -> list[Assignment]:
    """The current assignments that are still valid, with their bytes brought up to date."""
    indices = {place.device.id: index for index, place in enumerate(places)}
    by_model: dict[str, list[Assignment]] = {}
    for assignment in {each.replica: each for each in current}.values():
        by_model.setdefault(assignment.model, []).append(assignment)
    kept: list[Assignment] = []
    for want in wants:
        valid = [
            updated
            for assignment in by_model.get(want.entry.name, [])
            if (index := indices.get(assignment.device)) is not None
            and (updated := _still_valid(want, places[index], assignment, measured)) is not None
        ]
        kept += _most_useful(valid, want.deployment.replicas, places, indices, known.worth)
    priority = {want.entry.name: want.deployment.priority for want in wants}
    by_device: dict[DeviceId, list[Assignment]] = {}
    for assignment in kept:
        by_device.setdefault(assignment.device, []).append(assignment)
    staying = [
        assignment
        for device, here in by_device.items()
        for assignment in _within(here, places[indices[device]].device, priority, known.forgiven)
    ]
    return sorted(staying, key=lambda assignment: assignment.replica)


def _still_valid(want: Want, place: Place, assignment: Assignment, measured: Measured) -> Assignment | None:
    """The assignment with current bytes, or None where the deployment or the node no longer allows it."""
    deployment = want.deployment
    if barred(place.node, place.device, want.entry, deployment) is not None:
        return None
    updated = still_asked_for(assignment, deployment, want.entry, place.device, measured)
    return None if updated is None else replace(updated, node=place.node.id)


def still_asked_for(
    assignment: Assignment, deployment: Deployment, entry: ModelEntry, device: DeviceSnapshot, measured: Measured
) -> Assignment | None:
    """The assignment with current bytes where it is, but for its place, as the deployment wants it; None where it is not."""
    variant = next((each for each in wanted_variants(entry, deployment) if each.name == assignment.variant), None)
    if variant is None:
        return None
    cost = cost_on(device, entry, variant, deployment, measured)
    if _asked_for(cost.settings) != _asked_for(assignment.settings):
        return None
    return replace(assignment, memory=cost.memory)


def _asked_for(settings: RuntimeSettings) -> tuple[object, ...]:
    """What of the settings somebody wanted; the rest follows from the device."""
    return (settings.context, settings.slots, settings.kv_tokens, settings.kv_type, settings.gpu_layers)


def _most_useful(
    valid: list[Assignment],
    most: int,
    places: list[Place],
    indices: Mapping[DeviceId, int],
    worth: Mapping[ReplicaId, float],
) -> list[Assignment]:
    """At most `most` of a model's replicas: those of most worth, then one per node and GPUs before CPUs, then by id."""
    left = sorted(valid, key=lambda assignment: assignment.replica)
    if len(left) <= most:
        return left
    chosen: list[Assignment] = []
    while left and len(chosen) < most:
        beside = Counter(assignment.node for assignment in chosen)

        def key(assignment: Assignment, beside: Counter[NodeId] = beside) -> tuple[int, int, bool, float]:
            kind = places[indices[assignment.device]].device.kind
            value = worth.get(assignment.replica, 0.0)
            # Whole parts before the spread over nodes, fractions after it.
            return (-int(value), beside[assignment.node], kind is DeviceKind.CPU, -value)

        best = min(left, key=key)
        left.remove(best)
        chosen.append(best)
    return chosen


def _within(
    here: list[Assignment], device: DeviceSnapshot, priority: Mapping[str, int], forgiven: Collection[ReplicaId]
) -> list[Assignment]:
    """Drop replicas (lowest priority first, then the last by id) until what is left fits the device; but none that is forgiven."""
    staying = sorted(here, key=lambda each: (each.replica not in forgiven, -priority[each.model], each.replica))
    while staying and staying[-1].replica not in forgiven:
        if fits(sum(assignment.memory.total for assignment in staying), device):
            break
        staying.pop()
    return staying


def fits(promised: int, device: DeviceSnapshot) -> bool:
    """Within capacity; or resident already, and then only the reserve and the operator's cap can drive it out."""
    hard = min(device.memory_total - device.reserve, device.memory_total if device.cap is None else device.cap)
    resident = device.memory_held >= RESIDENT * promised
    return promised <= (hard if resident else device.capacity)


# --- what is new ----------------------------------------------------------------------------------------------------


def _search(
    wants: list[Want], places: list[Place], kept: list[Assignment], known: Circumstances, orders: int
) -> list[Assignment]:
    counts = Counter(assignment.model for assignment in kept)
    wants = [want for want in wants if counts[want.entry.name] < want.deployment.replicas]
    if not wants:
        return []
    placed = search(_ground(places, kept), wishes := _wishes(wants, places, kept, known), orders=orders)
    names = {assignment.replica for assignment in kept}
    made: list[Assignment] = []
    for one in sorted(placed, key=lambda one: (wishes[one.wish].name, wishes[one.wish].rank[one.device])):
        want, place = wants[one.wish], places[one.device]
        cost = want.costs(one.device)[one.option.variant]
        replica = replica_id(want.entry.name, place.node.id, place.device.id, names)
        names.add(replica)
        made.append(
            Assignment(
                replica=replica,
                model=want.entry.name,
                variant=cost.variant.name,
                device=place.device.id,
                node=place.node.id,
                memory=cost.memory,
                settings=cost.settings,
                reason="",
            )
        )
    return made


def _ground(places: list[Place], kept: list[Assignment]) -> Ground:
    index = {place.device.id: number for number, place in enumerate(places)}
    node_index = {node: number for number, node in enumerate(sorted({place.node.id for place in places}))}
    load = [0] * len(places)
    for assignment in kept:
        load[index[assignment.device]] += assignment.memory.total
    return Ground(
        free=tuple(place.capacity - load[number] for number, place in enumerate(places)),
        load=tuple(load),
        node=tuple(node_index[place.node.id] for place in places),
        gpu=tuple(place.device.kind is not DeviceKind.CPU for place in places),
        strength=tuple(_strength(place.device) for place in places),
    )


def _strength(device: DeviceSnapshot) -> int:
    """How much load a device should carry: memory stands for speed, since larger cards have more of both."""
    return max(1, device.memory_total // (CPU_STRENGTH if device.kind is DeviceKind.CPU else 1))


def _wishes(wants: list[Want], places: list[Place], kept: list[Assignment], known: Circumstances) -> list[Wish]:
    node_ids = sorted({place.node.id for place in places})
    by_model: dict[str, list[Assignment]] = {}
    for assignment in kept:
        by_model.setdefault(assignment.model, []).append(assignment)
    wishes = []
    for want in wants:
        own = by_model.get(want.entry.name, [])
        beside = Counter(assignment.node for assignment in own)
        wishes.append(
            Wish(
                name=want.entry.name,
                chat=want.entry.kind is ModelKind.CHAT,
                priority=want.deployment.priority,
                missing=want.deployment.replicas - len(own),
                options=want.options(),
                rank=_Ties(want.entry.name, places, known.holders.get(want.entry.name, ())),
                beside=tuple(beside[node] for node in node_ids),
            )
        )
    return wishes


class _Ties(Sequence[int]):
    """Each device's number in this model's order, smaller first: nodes that have its file, then highest-random-weight hashing, so that
    losing one device moves no other tie. Made when asked for: ties are few, and a large fleet would need 300,000 hashes.
    """

    def __init__(self, model: str, places: list[Place], holders: Collection[NodeId]):
        self._model = model
        self._places = places
        self._holders = holders
        self._known: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:  # type: ignore[override]  # nobody slices it
        number = self._known.get(index)
        if number is None:
            place = self._places[index]
            number = -hash_fraction(self._model, place.device.id)
            if place.node.id in self._holders:
                number -= 2**64
            self._known[index] = number
        return number

    def __len__(self) -> int:
        return len(self._places)


def replica_id(model: str, node: NodeId, device: DeviceId, taken: Collection[str]) -> ReplicaId:
    """`<model>@<node>-<device>#<n>`: the node's first 8 characters keep `cpu` of two nodes apart in the mesh, 8 of a GPU's uuid cards."""
    name = device.rpartition("/")[2]
    suffix = f"{node[:8]}-{name if len(name) <= 16 else name[:12]}"
    number = 0
    while (replica := ReplicaId(f"{model}@{suffix}#{number}")) in taken:
        number += 1
    return replica
