"""What is wanted, and what each device would cost for it: the ground that the planner searches.

Law of this file: pure; it compares a want with empty devices only. What else is there is `placement`'s and `placement_search`'s business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tars.core.placement_cost import (
    Cost,
    Measured,
    alike,
    barred,
    contradiction,
    cost_on,
    too_slow,
    wanted_variants,
)
from tars.core.tuning import SLOTS
from tars.core.types import (
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    NodeId,
    NodeSnapshot,
    Refusal,
    ReplicaId,
)

Load = tuple[str, str, DeviceId]
"""A model's variant on a device."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a coordinator knows beside the snapshot; without it the planner knows only what is wanted and what is there."""

    bars: Mapping[Load, str] = field(default_factory=dict)
    """Loads that are not tried for a while, each with the reason."""
    holders: Mapping[str, Collection[NodeId]] = field(default_factory=dict)
    """By model: nodes that have a file of it. All else equal, one of them is chosen, and nothing is copied."""
    forgiven: Collection[ReplicaId] = ()
    """Of `current`: stays although its device is over its capacity, for now."""
    worth: Mapping[ReplicaId, float] = field(default_factory=dict)
    """Of `current`: where a model has too many, the larger stays; 0 for those that are not named."""


@dataclass(frozen=True, slots=True)
class Place:
    """A device and its node. `kind` numbers the devices that cost the same (`placement_cost.alike`)."""

    node: NodeSnapshot
    device: DeviceSnapshot
    kind: int


@dataclass(frozen=True, slots=True)
class Want:
    """One deployment with its catalogue entry and, per device, the costs that it allows there, smallest first."""

    deployment: Deployment
    entry: ModelEntry
    costs: tuple[tuple[Cost, ...], ...]
    """What may go there and fits the empty device."""
    smallest: tuple[Cost, ...]
    """The least that it would take there, whether allowed or not."""


def places_of(nodes: Sequence[NodeSnapshot]) -> list[Place]:
    """Every device, in the order of ids."""
    kinds: dict[tuple[object, ...], int] = {}
    return [
        Place(node, device, kinds.setdefault(alike(device), len(kinds)))
        for node in sorted(nodes, key=lambda node: node.id)
        for device in sorted(node.devices, key=lambda device: device.id)
    ]


def resolve(
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


def want_of(
    deployment: Deployment,
    entry: ModelEntry,
    places: Sequence[Place],
    measured: Measured,
    bars: Mapping[Load, str],
) -> Want:
    """The deployment's costs on every device. Devices of one kind share them, so that a large fleet costs little more than its kinds."""
    variants = wanted_variants(entry, deployment) or entry.variants
    allowed = bool(wanted_variants(entry, deployment))
    by_kind: dict[int, tuple[Cost, ...]] = {}
    closed = {load[2] for load in bars if load[0] == entry.name}
    fitting: list[tuple[Cost, ...]] = []
    smallest: list[Cost] = []
    for place in places:
        device = place.device
        costs = by_kind.get(place.kind)
        if costs is None:
            costs = tuple(
                sorted(
                    (cost_on(device, entry, each, deployment, measured) for each in variants),
                    key=lambda cost: (cost.need, -cost.variant.quality),
                )
            )
            by_kind[place.kind] = costs
        smallest.append(costs[0])
        capacity = device.capacity
        if not allowed or costs[0].need > capacity or barred(place.node, device, entry, deployment) is not None:
            fitting.append(())
            continue
        least = costs
        if len(costs) > 1 and costs[-1].need > capacity:
            least = tuple(cost for cost in costs if cost.need <= capacity)
        if device.kind is DeviceKind.CPU or device.id in closed:
            least = tuple(
                cost
                for cost in least
                if not too_slow(device, entry, cost.variant, deployment)
                and (entry.name, cost.variant.name, device.id) not in bars
            )
        fitting.append(least)
    return Want(deployment, entry, tuple(fitting), tuple(smallest))
