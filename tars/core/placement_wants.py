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
from tars.core.placement_search import Option
from tars.core.tuning import SLOTS
from tars.core.types import (
    Bytes,
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
    capacity: Bytes
    special: bool
    """A CPU, a node that drains or a device that some models cannot run on: more decides there than memory."""


class Want:
    """One deployment with its catalogue entry, and what it costs on each device. Made when asked for: most plans place a few models
    anew, and look at the devices of the others only where those are.
    """

    def __init__(
        self,
        deployment: Deployment,
        entry: ModelEntry,
        places: Sequence[Place],
        measured: Measured,
        bars: Mapping[Load, str],
    ):
        self.deployment = deployment
        self.entry = entry
        self._places = places
        self._measured = measured
        self._bars = {load: reason for load, reason in bars.items() if load[0] == entry.name}
        self._closed = {load[2] for load in self._bars}
        self._allowed = wanted_variants(entry, deployment)
        self._kinds: dict[int, tuple[Cost, ...]] = {}
        self._fitting: dict[tuple[int, int], tuple[tuple[Cost, ...], tuple[Option, ...]]] = {}
        self._needs: dict[int, tuple[int, ...]] = {}

    def costs(self, number: int) -> tuple[Cost, ...]:
        """What may go to a device and fits it when it is empty, smallest first."""
        return self._allowed_at(number)[0]

    def options(self) -> tuple[tuple[Option, ...], ...]:
        """`costs` of every device in the words of the search."""
        return tuple(self._allowed_at(number)[1] for number in range(len(self._places)))

    def _allowed_at(self, number: int) -> tuple[tuple[Cost, ...], tuple[Option, ...]]:
        place = self._places[number]
        device = place.device
        costs = self._of_kind(place)
        fitting = 0
        if self._allowed:
            for need in self._needs[place.kind]:
                if need > place.capacity:
                    break
                fitting += 1
        if not (place.special or self._closed or self.deployment.device is not None):
            # Devices of a kind differ only in how many of its costs fit.
            found = self._fitting.get((place.kind, fitting))
            if found is None:
                found = self._fitting[place.kind, fitting] = _with_options(costs[:fitting])
            return found
        if barred(place.node, device, self.entry, self.deployment) is not None:
            fitting = 0
        return _with_options(
            tuple(
                cost
                for cost in costs[:fitting]
                if not too_slow(device, self.entry, cost.variant, self.deployment)
                and (self.entry.name, cost.variant.name, device.id) not in self._bars
            )
        )

    def smallest(self, number: int) -> Cost:
        """The least that it would take on a device, whether allowed or not."""
        return self._of_kind(self._places[number])[0]

    def _of_kind(self, place: Place) -> tuple[Cost, ...]:
        """Of all variants that are allowed, or of all where none is; devices of one kind share them."""
        costs = self._kinds.get(place.kind)
        if costs is None:
            variants = self._allowed or self.entry.variants
            costs = tuple(
                sorted(
                    (cost_on(place.device, self.entry, each, self.deployment, self._measured) for each in variants),
                    key=lambda cost: (cost.need, -cost.variant.quality),
                )
            )
            self._kinds[place.kind] = costs
            self._needs[place.kind] = tuple(cost.need for cost in costs)
        return costs


def _with_options(costs: tuple[Cost, ...]) -> tuple[tuple[Cost, ...], tuple[Option, ...]]:
    return costs, tuple(Option(cost.need, cost.variant.quality, index) for index, cost in enumerate(costs))


def places_of(nodes: Sequence[NodeSnapshot]) -> list[Place]:
    """Every device, in the order of ids."""
    kinds: dict[tuple[object, ...], int] = {}
    return [
        Place(
            node,
            device,
            kinds.setdefault(alike(device), len(kinds)),
            device.capacity,
            device.kind is DeviceKind.CPU or node.draining or bool(device.cannot_run),
        )
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
