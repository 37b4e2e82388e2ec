"""Moves of healthy replicas: that make room for a model that is refused or for a program that took the rest of a device, or that bring two
replicas of a model apart.

Law of this file: pure; it finds a move and decides nothing about when. Every replica goes to a device that has room for it now, keeps its
variant, and does not go from a GPU to a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tars.core.placement_cost import Cost, Measured, alike, barred, cost_on, too_slow, wanted_variants
from tars.core.placement_wants import Circumstances
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    NodeSnapshot,
    ReplicaId,
)

MOVES_MOST = 3
"""More reloads than this for one model are a rearrangement, not a move."""


@dataclass(frozen=True, slots=True)
class Relocation:
    """One replica and the device that takes it."""

    assignment: Assignment
    node: NodeSnapshot
    device: DeviceSnapshot
    cost: Cost


@dataclass(frozen=True, slots=True)
class Room:
    """Moves after which a model fits: all of them together; `need` bytes on `device`."""

    node: NodeSnapshot
    device: DeviceSnapshot
    need: Bytes
    moves: tuple[Relocation, ...]

    @property
    def moved(self) -> Bytes:
        """Bytes that are loaded anew."""
        return Bytes(sum(move.cost.need for move in self.moves))


class Ground:
    """Every device with what is planned there, and what each model would cost elsewhere."""

    def __init__(
        self,
        nodes: Sequence[NodeSnapshot],
        assignments: Sequence[Assignment],
        wanted: Mapping[str, tuple[Deployment, ModelEntry]],
        measured: Measured,
        circumstances: Circumstances,
    ):
        self._places = [(node, device) for node in nodes for device in node.devices]
        self._wanted = wanted
        self._measured = measured
        self._known = circumstances
        self._here: dict[DeviceId, list[Assignment]] = {}
        for assignment in assignments:
            self._here.setdefault(assignment.device, []).append(assignment)
        self._free = {
            device.id: device.capacity - sum(each.memory.total for each in self._here.get(device.id, ()))
            for _, device in self._places
        }
        self._costs: dict[tuple[str, tuple[object, ...]], list[Cost]] = {}
        self._kinds = {device.id: device.kind for _, device in self._places}

    def for_model(self, model: str, movable: Mapping[ReplicaId, Assignment], margin: float) -> Room | None:
        """The cheapest way to make room for one replica of `model`; None where none pays: at most `margin` bytes moved for each placed."""
        deployment, entry = self._wanted[model]
        found: list[tuple[tuple[float, int, str], Room]] = []
        for node, device in self._places:
            costs = self._allowed(node, device, entry, deployment)
            if not costs:
                continue
            need = min(cost.need for cost in costs)
            short = need - self._free[device.id]
            if need > device.capacity or short <= 0:
                continue
            moves = self._clear(device, short, movable)
            if moves is not None:
                room = Room(node, device, need, moves)
                if room.moved <= margin * need:
                    found.append(((room.moved, len(moves), device.id), room))
        return min(found, key=lambda each: each[0])[1] if found else None

    def elsewhere(self, assignment: Assignment) -> Relocation | None:
        """Where a replica fits beside its present device."""
        return self._home(assignment, self._free)

    def apart(self, assignment: Assignment) -> Relocation | None:
        """Where a replica fits on a node that has none of its model."""
        home = self._home(assignment, self._free)
        if home is None or any(
            each.model == assignment.model and each.node == home.node.id
            for here in self._here.values()
            for each in here
        ):
            return None
        return home

    def _clear(
        self, device: DeviceSnapshot, short: int, movable: Mapping[ReplicaId, Assignment]
    ) -> tuple[Relocation, ...] | None:
        """Free `short` bytes: by one replica where one suffices, the smallest that does; else by the largest ones."""
        here = sorted(
            (each for each in self._here.get(device.id, ()) if each.replica in movable),
            key=lambda each: (each.memory.total, each.replica),
        )
        for each in here:
            if each.memory.total >= short and (home := self._home(each, self._free)) is not None:
                return (home,)
        free = dict(self._free)
        moves: list[Relocation] = []
        for each in reversed(here):
            if short <= 0 or len(moves) == MOVES_MOST:
                break
            if (home := self._home(each, free)) is not None:
                free[home.device.id] -= home.cost.need
                short -= each.memory.total
                moves.append(home)
        return tuple(moves) if short <= 0 else None

    def _home(self, assignment: Assignment, free: Mapping[DeviceId, int]) -> Relocation | None:
        """Where the model has fewest replicas on the node; of those where the file is; of those the device with the least left over."""
        if assignment.model not in self._wanted:
            return None
        deployment, entry = self._wanted[assignment.model]
        holders = self._known.holders.get(entry.name, ())
        on_card = self._kinds.get(assignment.device) is not DeviceKind.CPU
        beside = Counter(
            each.node
            for here in self._here.values()
            for each in here
            if each.model == assignment.model and each.replica != assignment.replica
        )
        found = []
        for node, device in self._places:
            if device.id == assignment.device or (on_card and device.kind is DeviceKind.CPU):
                continue
            for cost in self._allowed(node, device, entry, deployment):
                left = free[device.id] - cost.need
                if cost.variant.name == assignment.variant and left >= 0:
                    found.append(
                        (
                            (beside[node.id], node.id not in holders, left, device.id),
                            Relocation(assignment, node, device, cost),
                        )
                    )
        return min(found, key=lambda each: each[0])[1] if found else None

    def _allowed(
        self, node: NodeSnapshot, device: DeviceSnapshot, entry: ModelEntry, deployment: Deployment
    ) -> list[Cost]:
        if barred(node, device, entry, deployment) is not None:
            return []
        kind = (entry.name, alike(device))
        if kind not in self._costs:
            self._costs[kind] = [
                cost_on(device, entry, variant, deployment, self._measured)
                for variant in wanted_variants(entry, deployment)
                if not too_slow(device, entry, variant, deployment)
            ]
        bars = self._known.bars
        return [cost for cost in self._costs[kind] if (entry.name, cost.variant.name, device.id) not in bars]
