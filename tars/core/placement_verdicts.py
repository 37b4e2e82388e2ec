"""The words of a plan: every replica's reason, every refusal's remedy at once, and every device's verdict when somebody looks at it.

Law of this file: pure; it puts together what `placement_reasons` and `placement_remedies` say and decides nothing. 1,000 devices and 300
models have 300,000 verdicts, of which a person reads one model's: so they are made on the first look, from values that cannot change
any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from tars.core.placement_reasons import Standing, reason_for, verdicts_on
from tars.core.placement_remedies import refusal_of
from tars.core.placement_wants import Circumstances, Place, Want
from tars.core.types import Assignment, Bytes, DeviceId, DeviceVerdict, Plan, Refusal, ReplicaId


class Verdicts(Mapping[str, tuple[DeviceVerdict, ...]]):
    """By model: the verdict of every device for it. Equal to any mapping with the same verdicts."""

    def __init__(self, scene: Scene):
        self._scene = scene
        self._made: dict[str, tuple[DeviceVerdict, ...]] = {}

    def __getitem__(self, model: str) -> tuple[DeviceVerdict, ...]:
        """Of one model; `KeyError` where nobody wants it."""
        if model not in self._made:
            want = self._scene.wants[model]
            self._made[model] = verdicts_on(self._scene.standings(want), want.entry, want.deployment)
        return self._made[model]

    def __iter__(self) -> Iterator[str]:
        """The models, by name."""
        return iter(self._scene.wants)

    def __len__(self) -> int:
        """How many models."""
        return len(self._scene.wants)

    def __eq__(self, other: object) -> bool:
        """By content."""
        return isinstance(other, Mapping) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]  # as of every mapping that is compared by content

    def __repr__(self) -> str:
        """As a dictionary."""
        return repr(dict(self))


class Scene:
    """Everything that is placed, as `placement_reasons` wants to see it."""

    def __init__(
        self,
        wants: Sequence[Want],
        places: Sequence[Place],
        left: Sequence[int],
        assignments: Sequence[Assignment],
        circumstances: Circumstances,
    ):
        self.wants = {want.entry.name: want for want in wants}
        self._places = places
        self._numbers = {place.device.id: number for number, place in enumerate(places)}
        self._left = [Bytes(max(0, each)) for each in left]
        self._own: dict[str, dict[DeviceId, tuple[Assignment, ...]]] = {}
        models: dict[DeviceId, set[str]] = {}
        for assignment in assignments:
            mine = self._own.setdefault(assignment.model, {})
            mine[assignment.device] = (*mine.get(assignment.device, ()), assignment)
            models.setdefault(assignment.device, set()).add(assignment.model)
        self._models = {device: tuple(sorted(names)) for device, names in models.items()}
        self._bars: dict[str, dict[DeviceId, dict[str, str]]] = {}
        for (model, variant, device), reason in circumstances.bars.items():
            self._bars.setdefault(model, {}).setdefault(device, {})[variant] = reason

    def standings(self, want: Want, *, own_only: bool = False) -> list[Standing]:
        """Every device as this model sees it; `own_only`: those that it is on."""
        own = self._own.get(want.entry.name, {})
        bars = self._bars.get(want.entry.name, {})
        none: dict[str, str] = {}
        found = []
        numbers = sorted(self._numbers[device] for device in own) if own_only else range(len(self._places))
        for number in numbers:
            place = self._places[number]
            device = place.device.id
            here = own.get(device, ())
            there = self._models.get(device, ())
            found.append(
                Standing(
                    place.node,
                    place.device,
                    here,
                    self._left[number],
                    want.costs(number),
                    want.smallest(number),
                    tuple(each for each in there if each != want.entry.name) if here else there,
                    bars.get(device, none),
                )
            )
        return found


def with_reasons(
    scene: Scene,
    assignments: Sequence[Assignment],
    stays: Collection[ReplicaId],
    unknown: Sequence[Refusal],
    fresh: Mapping[str, int],
) -> Plan:
    """The plan. `stays` are those that are loaded already; `fresh` counts what a plan from nothing would place, where it places more."""
    own: dict[str, list[Assignment]] = {}
    for assignment in assignments:
        own.setdefault(assignment.model, []).append(assignment)
    explained: list[Assignment] = []
    refusals = list(unknown)
    verdicts = Verdicts(scene)
    for model, want in scene.wants.items():
        mine = own.get(model, [])
        missing = want.deployment.replicas - len(mine)
        # What stays needs no comparison with other devices.
        unmoved = missing <= 0 and all(each.replica in stays for each in mine)
        standings = scene.standings(want, own_only=unmoved)
        by_device = {standing.device.id: standing for standing in standings if standing.here}
        for assignment in mine:
            reason = reason_for(
                assignment,
                by_device[assignment.device],
                standings,
                want.entry,
                want.deployment,
                stays=assignment.replica in stays,
            )
            explained.append(replace(assignment, reason=reason))
        if missing > 0:
            gain = fresh.get(model, 0) > len(mine)
            refusals.append(
                refusal_of(missing, standings, verdicts[model], want.entry, want.deployment, would_fit_fresh=gain)
            )
    return Plan(
        assignments=tuple(sorted(explained, key=lambda each: each.replica)),
        refusals=tuple(sorted(refusals, key=lambda refusal: refusal.model)),
        verdicts=verdicts,
    )
