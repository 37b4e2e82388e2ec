"""The planner: which replica goes on which device, and why; and why not elsewhere.

Law of this file: pure and deterministic, so that every node makes the same plan from the same snapshot. In this order: what is placed and
still valid stays (a healthy replica never moves); missing replicas are searched for (`placement_search`); every (model, device) gets a
verdict and every replica that fits nowhere a refusal with a remedy (`placement_reasons`). Nothing is ever placed in hope: on every
device the bytes of all assignments stay within `DeviceSnapshot.capacity`, save what is resident already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tars.core.placement_cost import (
    Cost,
    Measured,
    MeasuredKey,
    barred,
    contradiction,
    cost_on,
    measured_key,
    too_slow,
    wanted_variants,
)
from tars.core.placement_reasons import Standing, reason_for, refusal_of, verdict_on
from tars.core.placement_search import Ground, Option, Wish, hash_fraction, search
from tars.core.tuning import SLOTS
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    DeviceVerdict,
    ModelEntry,
    ModelKind,
    NodeId,
    NodeSnapshot,
    Plan,
    Refusal,
    ReplicaId,
    RuntimeSettings,
)

__all__ = ["MeasuredKey", "measured_key", "plan"]

ORDERS = 200
"""Orders of replicas that are tried. On random fleets at 80 % fill 200 place as much as CP-SAT's optimum (field notes, Placement)."""
REPLAN_ORDERS = 40
"""Orders for the question whether a plan from nothing would place more: it only words a remedy."""
CPU_STRENGTH = 16
"""By how much a byte of RAM counts less than one of a card when load is spread: DDR4 gives about 40 GB/s where cards give 340 to 1,000."""
RESIDENT = 0.8
"""A device that holds this share of what its replicas were promised has loaded them: estimates err by a few percent, buffers come late."""


@dataclass(frozen=True, slots=True)
class _Place:
    node: NodeSnapshot
    device: DeviceSnapshot


@dataclass(frozen=True, slots=True)
class _Want:
    """One deployment with its catalogue entry and, per device, the costs that it allows there, smallest first."""

    deployment: Deployment
    entry: ModelEntry
    costs: tuple[tuple[Cost, ...], ...]
    """What may go there and fits the empty device."""
    smallest: tuple[Cost, ...]
    """The least that it would take there, whether allowed or not."""


def plan(
    nodes: Sequence[NodeSnapshot],
    models: Mapping[str, ModelEntry],
    deployments: Sequence[Deployment],
    current: Sequence[Assignment] = (),
    measured: Measured | None = None,
    *,
    orders: int = ORDERS,
) -> Plan:
    """Place `deployments` on `nodes`.

    `current` is what runs or loads now; `DeviceSnapshot.memory_held` is what those hold there (while one loads, give the snapshot from
    before it began, or count what it has taken as held; else its own load looks like a foreign program's). Of two deployments of one
    model the larger counts. A deployment of a model that `models` lacks, by name and alias, is refused.
    """
    measured = {} if measured is None else measured
    places = [
        _Place(node, device)
        for node in sorted(nodes, key=lambda node: node.id)
        for device in sorted(node.devices, key=lambda device: device.id)
    ]
    by_model, unknown = _resolve(deployments, models)
    wants = [_want(deployment, entry, places, measured) for deployment, entry in by_model]
    kept = _keep(wants, places, current, measured)
    assignments = [*kept, *_search(wants, places, kept, orders)]
    return _with_reasons(wants, places, kept, assignments, unknown)


# --- what is wanted -------------------------------------------------------------------------------------------------


def _resolve(
    deployments: Sequence[Deployment], models: Mapping[str, ModelEntry]
) -> tuple[list[tuple[Deployment, ModelEntry]], list[Refusal]]:
    """Deployments by canonical model name, one each, in the order of names; refusals for those that nobody knows."""
    names = {alias.casefold(): entry for entry in models.values() for alias in (*entry.aliases, entry.name)}
    found: dict[str, tuple[Deployment, ModelEntry]] = {}
    unknown: dict[str, Refusal] = {}
    for deployment in sorted(deployments, key=_size):
        entry = models.get(deployment.model) or names.get(deployment.model.casefold())
        if deployment.replicas < 1:
            continue
        if entry is not None and (wrong := contradiction(entry, deployment)) is not None:
            unknown[entry.name] = Refusal(entry.name, deployment.replicas, (), wrong)
        elif entry is not None and entry.variants:
            found[entry.name] = (deployment, entry)
        elif entry is not None:
            remedy = "Nothing is known of its size: name its file in a [[model]] table (name, path)."
            unknown[entry.name] = Refusal(entry.name, deployment.replicas, (), remedy)
        else:
            remedy = "The catalogue has no such model; add it with a [[model]] table or choose one from `tars models`."
            unknown[deployment.model] = Refusal(deployment.model, deployment.replicas, (), remedy)
    return [found[name] for name in sorted(found)], [unknown[name] for name in sorted(unknown)]


def _size(deployment: Deployment) -> tuple[int, int, int, int, str]:
    slots = SLOTS if deployment.slots is None else deployment.slots
    return (deployment.replicas, slots, deployment.kv_tokens or 0, deployment.context or 0, repr(deployment))


def _want(deployment: Deployment, entry: ModelEntry, places: list[_Place], measured: Measured) -> _Want:
    variants = wanted_variants(entry, deployment) or entry.variants
    allowed = wanted_variants(entry, deployment)
    fitting: list[tuple[Cost, ...]] = []
    smallest: list[Cost] = []
    for place in places:
        costs = [cost_on(place.device, entry, variant, deployment, measured) for variant in variants]
        costs.sort(key=lambda cost: (cost.need, -cost.variant.quality))
        smallest.append(costs[0])
        fitting.append(
            tuple(
                cost
                for cost in costs
                if allowed
                and cost.need <= place.device.capacity
                and barred(place.node, place.device, entry, deployment) is None
                and not too_slow(place.device, entry, cost.variant, deployment)
            )
        )
    return _Want(deployment, entry, tuple(fitting), tuple(smallest))


# --- what stays -----------------------------------------------------------------------------------------------------


def _keep(
    wants: list[_Want], places: list[_Place], current: Sequence[Assignment], measured: Measured
) -> list[Assignment]:
    """The current assignments that are still valid, with their bytes brought up to date."""
    indices = {place.device.id: index for index, place in enumerate(places)}
    kept: list[Assignment] = []
    for want in wants:
        valid = [
            updated
            for assignment in {each.replica: each for each in current}.values()
            if assignment.model == want.entry.name
            and (index := indices.get(assignment.device)) is not None
            and (updated := _still_valid(want, places[index], assignment, measured)) is not None
        ]
        kept += _most_useful(valid, want.deployment.replicas, places, indices)
    priority = {want.entry.name: want.deployment.priority for want in wants}
    for place in places:
        kept = _within(kept, place.device, priority)
    return sorted(kept, key=lambda assignment: assignment.replica)


def _still_valid(want: _Want, place: _Place, assignment: Assignment, measured: Measured) -> Assignment | None:
    """The assignment with current bytes, or None where the deployment or the node no longer allows it."""
    deployment = want.deployment
    variant = next((each for each in wanted_variants(want.entry, deployment) if each.name == assignment.variant), None)
    if variant is None or barred(place.node, place.device, want.entry, deployment) is not None:
        return None
    cost = cost_on(place.device, want.entry, variant, deployment, measured)
    if _asked_for(cost.settings) != _asked_for(assignment.settings):
        return None
    return replace(assignment, memory=cost.memory, node=place.node.id)


def _asked_for(settings: RuntimeSettings) -> tuple[object, ...]:
    """What of the settings somebody wanted; the rest follows from the device."""
    return (settings.context, settings.slots, settings.kv_tokens, settings.kv_type, settings.gpu_layers)


def _most_useful(
    valid: list[Assignment], most: int, places: list[_Place], indices: Mapping[DeviceId, int]
) -> list[Assignment]:
    """At most `most` of a model's replicas: first one per node and GPUs before CPUs, then by id."""
    left = sorted(valid, key=lambda assignment: assignment.replica)
    chosen: list[Assignment] = []
    while left and len(chosen) < most:
        beside = Counter(assignment.node for assignment in chosen)

        def key(assignment: Assignment, beside: Counter[NodeId] = beside) -> tuple[int, bool]:
            kind = places[indices[assignment.device]].device.kind
            return (beside[assignment.node], kind is DeviceKind.CPU)

        best = min(left, key=key)
        left.remove(best)
        chosen.append(best)
    return chosen


def _within(kept: list[Assignment], device: DeviceSnapshot, priority: Mapping[str, int]) -> list[Assignment]:
    """Drop replicas (lowest priority first, then the last by id) until what is left fits the device."""
    here = sorted(
        (assignment for assignment in kept if assignment.device == device.id),
        key=lambda assignment: (-priority[assignment.model], assignment.replica),
    )
    while here and not _fits(sum(assignment.memory.total for assignment in here), device):
        here.pop()
    stays = {assignment.replica for assignment in here}
    return [assignment for assignment in kept if assignment.device != device.id or assignment.replica in stays]


def _fits(promised: int, device: DeviceSnapshot) -> bool:
    """Within capacity; or resident already, and then only the reserve and the operator's cap can drive it out."""
    hard = min(device.memory_total - device.reserve, device.memory_total if device.cap is None else device.cap)
    resident = device.memory_held >= RESIDENT * promised
    return promised <= (hard if resident else device.capacity)


# --- what is new ----------------------------------------------------------------------------------------------------


def _search(wants: list[_Want], places: list[_Place], kept: list[Assignment], orders: int) -> list[Assignment]:
    placed = search(_ground(places, kept), wishes := _wishes(wants, places, kept), orders=orders)
    names = {assignment.replica for assignment in kept}
    made: list[Assignment] = []
    for one in sorted(placed, key=lambda one: (wishes[one.wish].name, wishes[one.wish].rank[one.device])):
        want, place = wants[one.wish], places[one.device]
        cost = want.costs[one.device][one.option.variant]
        replica = _replica_id(want.entry.name, place, names)
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


def _ground(places: list[_Place], kept: list[Assignment]) -> Ground:
    index = {place.device.id: number for number, place in enumerate(places)}
    node_index = {node: number for number, node in enumerate(sorted({place.node.id for place in places}))}
    load = [0] * len(places)
    for assignment in kept:
        load[index[assignment.device]] += assignment.memory.total
    return Ground(
        free=tuple(place.device.capacity - load[number] for number, place in enumerate(places)),
        load=tuple(load),
        node=tuple(node_index[place.node.id] for place in places),
        gpu=tuple(place.device.kind is not DeviceKind.CPU for place in places),
        strength=tuple(_strength(place.device) for place in places),
    )


def _strength(device: DeviceSnapshot) -> int:
    """How much load a device should carry: memory stands for speed, since larger cards have more of both."""
    return max(1, device.memory_total // (CPU_STRENGTH if device.kind is DeviceKind.CPU else 1))


def _wishes(wants: list[_Want], places: list[_Place], kept: list[Assignment]) -> list[Wish]:
    node_ids = sorted({place.node.id for place in places})
    wishes = []
    for want in wants:
        own = [assignment for assignment in kept if assignment.model == want.entry.name]
        beside = Counter(assignment.node for assignment in own)
        wishes.append(
            Wish(
                name=want.entry.name,
                chat=want.entry.kind is ModelKind.CHAT,
                priority=want.deployment.priority,
                missing=want.deployment.replicas - len(own),
                options=tuple(
                    tuple(Option(cost.need, cost.variant.quality, number) for number, cost in enumerate(costs))
                    for costs in want.costs
                ),
                rank=_rendezvous(want.entry.name, [place.device.id for place in places]),
                beside=tuple(beside[node] for node in node_ids),
            )
        )
    return wishes


def _rendezvous(model: str, devices: list[DeviceId]) -> tuple[int, ...]:
    """Each device's place in this model's order: highest-random-weight hashing, so that losing one device moves no other tie."""
    order = sorted(devices, key=lambda device: hash_fraction(model, device), reverse=True)
    ranks = {device: rank for rank, device in enumerate(order)}
    return tuple(ranks[device] for device in devices)


def _replica_id(model: str, place: _Place, taken: Iterable[str]) -> ReplicaId:
    """`<model>@<node>-<device>#<n>`: the node's first 8 characters keep `cpu` of two nodes apart in the mesh, 8 of a GPU's uuid cards."""
    device = place.device.id.rpartition("/")[2]
    suffix = f"{place.node.id[:8]}-{device if len(device) <= 16 else device[:12]}"
    number = 0
    while (replica := ReplicaId(f"{model}@{suffix}#{number}")) in taken:
        number += 1
    return replica


# --- why ------------------------------------------------------------------------------------------------------------


def _with_reasons(
    wants: list[_Want],
    places: list[_Place],
    kept: list[Assignment],
    assignments: list[Assignment],
    unknown: list[Refusal],
) -> Plan:
    stays = {assignment.replica for assignment in kept}
    free = _ground(places, assignments)
    verdicts: dict[str, tuple[DeviceVerdict, ...]] = {}
    reasons: dict[ReplicaId, str] = {}
    refusals = list(unknown)
    missing_any = any(
        sum(each.model == want.entry.name for each in assignments) < want.deployment.replicas for want in wants
    )
    fresh = (
        Counter(each.model for each in _search(wants, places, [], REPLAN_ORDERS)) if missing_any and kept else Counter()
    )
    for want in wants:
        own = [assignment for assignment in assignments if assignment.model == want.entry.name]
        standings = []
        for number, place in enumerate(places):
            here = tuple(each for each in own if each.device == place.device.id)
            standings.append(
                Standing(
                    node=place.node,
                    device=place.device,
                    here=here,
                    left=Bytes(max(0, free.free[number])),
                    costs=want.costs[number],
                    smallest=want.smallest[number],
                    others=tuple(
                        sorted(
                            {e.model for e in assignments if e.device == place.device.id and e.model != want.entry.name}
                        )
                    ),
                )
            )
        verdicts[want.entry.name] = tuple(
            verdict_on(standing, standings, want.entry, want.deployment) for standing in standings
        )
        for assignment in own:
            standing = next(each for each in standings if each.device.id == assignment.device)
            reasons[assignment.replica] = reason_for(
                assignment, standing, standings, want.entry, want.deployment, stays=assignment.replica in stays
            )
        missing = want.deployment.replicas - len(own)
        if missing > 0:
            gain = fresh[want.entry.name] > len(own) and sum(fresh.values()) > len(assignments)
            refusals.append(
                refusal_of(
                    missing, standings, verdicts[want.entry.name], want.entry, want.deployment, would_fit_fresh=gain
                )
            )
    explained = [replace(each, reason=reasons[each.replica]) for each in assignments]
    return Plan(
        assignments=tuple(sorted(explained, key=lambda each: each.replica)),
        refusals=tuple(sorted(refusals, key=lambda refusal: refusal.model)),
        verdicts=verdicts,
    )
