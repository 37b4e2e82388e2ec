"""Why a replica is where it is, and why not elsewhere.

Law of this file: pure; it words what `placement` decided and decides nothing, from the same costs that the planner counts. What would make
a refused one fit is `placement_remedies`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tars.core.placement_cost import CPU_CHAT_MOST, Cost, barred, too_slow, wanted_variants
from tars.core.tuning import all_gpu_layers
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceKind,
    DeviceSnapshot,
    DeviceVerdict,
    ModelEntry,
    ModelKind,
    NodeSnapshot,
)


class Standing(NamedTuple):
    """One device as one model sees it, after everything is placed. A tuple, because a large fleet makes 300,000 of them."""

    node: NodeSnapshot
    device: DeviceSnapshot
    here: tuple[Assignment, ...]
    """The model's own replicas there."""
    left: Bytes
    """Free beside everything that is placed there."""
    costs: tuple[Cost, ...]
    """What the deployment allows there and fits the empty device, smallest first."""
    smallest: Cost
    """The least it would take there, allowed or not."""
    others: tuple[str, ...]
    """Other models there."""
    bars: Mapping[str, str] = {}
    """Variants that may not be loaded there for a while, each with the reason: a load failed."""

    @property
    def taken(self) -> Bytes:
        """Bytes of the model's own replicas there."""
        return Bytes(sum(assignment.memory.total for assignment in self.here))

    @property
    def foreign(self) -> Bytes:
        """Bytes that programs beside TARS hold there."""
        return Bytes(max(0, self.device.memory_total - self.device.memory_free - self.device.memory_held))

    @property
    def place(self) -> str:
        """`RTX 3060 of pc1`."""
        return f"{self.device.name} of {self.node.name}"


# --- verdicts -------------------------------------------------------------------------------------------------------


def verdicts_on(standings: Sequence[Standing], entry: ModelEntry, deployment: Deployment) -> tuple[DeviceVerdict, ...]:
    """The verdict of each device. `needed` is of one replica of the variant named, or of all that are there; `free` without them."""
    winners = [each for each in standings if each.here]
    return tuple(_verdict_on(standing, winners, entry, deployment) for standing in standings)


def _verdict_on(
    standing: Standing, winners: Sequence[Standing], entry: ModelEntry, deployment: Deployment
) -> DeviceVerdict:
    if standing.here:
        count = "" if len(standing.here) == 1 else f"{len(standing.here)} replicas "
        reason = f"{count}placed here".strip()
        return _verdict(standing, standing.here[0].variant, True, standing.taken, reason)
    fitting = [cost for cost in standing.costs if cost.need <= standing.left]
    if fitting:
        best = max(fitting, key=lambda cost: (cost.variant.quality, -cost.need))
        return _verdict(standing, best.variant.name, False, best.need, _outdone(standing, winners, entry, deployment))
    cost = standing.costs[0] if standing.costs else standing.smallest
    return _verdict(standing, cost.variant.name, False, cost.need, _no_room(standing, cost, entry, deployment))


def _verdict(standing: Standing, variant: str, accepted: bool, needed: Bytes, reason: str) -> DeviceVerdict:
    return DeviceVerdict(
        device=standing.device.id,
        device_name=standing.device.name,
        variant=variant,
        accepted=accepted,
        needed=needed,
        free=Bytes(standing.left + standing.taken),
        reason=reason,
    )


def _no_room(standing: Standing, cost: Cost, entry: ModelEntry, deployment: Deployment) -> str:
    bar = barred(standing.node, standing.device, entry, deployment)
    if bar is not None:
        return bar
    if not wanted_variants(entry, deployment):
        return f"there is no variant {deployment.variant}"
    capacity = standing.device.capacity
    if cost.need > capacity:
        needed, there = _apart(cost.need, capacity)
        return f"too large: needs {needed}, {there} can be had here{_what_holds_back(standing, cost.need)}"
    if cost.variant.name in standing.bars:
        return standing.bars[cost.variant.name]
    if too_slow(standing.device, entry, cost.variant, deployment):
        return (
            f"too slow: a CPU reads {cost.variant.shape.tensor_bytes} of weights for every token; "
            f"chat models above {CPU_CHAT_MOST} go there only when pinned"
        )
    beside = f" beside {', '.join(standing.others)}" if standing.others else ""
    needed, there = _apart(cost.need, standing.left)
    return f"no room: needs {needed}, {there} free{beside}"


def _apart(needed: Bytes, there: Bytes) -> tuple[str, str]:
    """Both as text that shows which is more: in MiB where tenths of a GiB do not tell them apart."""
    if str(needed) != str(there):
        return str(needed), str(there)
    return f"{needed.in_mib:,.1f} MiB", f"{there.in_mib:,.1f} MiB"


def _what_holds_back(standing: Standing, need: Bytes) -> str:
    """Which limit bites, where it is not the card's size."""
    device = standing.device
    if need > device.memory_total - device.reserve:
        return ""
    if device.cap is not None and device.capacity == device.cap:
        return " (the operator's cap)"
    return f" (other programs hold {standing.foreign})"


def _outdone(standing: Standing, winners: Sequence[Standing], entry: ModelEntry, deployment: Deployment) -> str:
    """Why a device that has room was not taken."""
    if not winners:
        return "would fit"
    names = ", ".join(each.place for each in winners)
    if standing.device.kind is DeviceKind.CPU and any(each.device.kind is not DeviceKind.CPU for each in winners):
        return f"would fit; a GPU answers faster: {names}"
    if all(each.node.id == standing.node.id for each in winners) and len(winners) < deployment.replicas:
        return f"would fit; {names} is the better place"
    if entry.kind is not ModelKind.CHAT and all(
        each.device.memory_total < standing.device.memory_total for each in winners
    ):
        return f"would fit; a smaller card does, and leaves this one to chat models: {names}"
    if all(each.device.memory_total > standing.device.memory_total for each in winners):
        return f"would fit; a larger card is faster: {names}"
    return f"would fit; the load is spread better with it on {names}"


# --- reasons of an assignment ---------------------------------------------------------------------------------------


def reason_for(
    assignment: Assignment,
    standing: Standing,
    standings: Sequence[Standing],
    entry: ModelEntry,
    deployment: Deployment,
    *,
    stays: bool,
) -> str:
    """One sentence: bytes, why this device, why this variant."""
    free = Bytes(standing.left + assignment.memory.total)
    told = "measured" if assignment.memory.measured is not None else "estimated"
    parts = [f"needs {assignment.memory.total} ({told}) of {free} free"]
    parts.append("stays where it is loaded" if stays else _why_here(standing, standings, entry, deployment))
    variant = _why_variant(assignment, standing, entry, deployment)
    if variant:
        parts.append(variant)
    shape = next((each.shape for each in entry.variants if each.name == assignment.variant), None)
    layers = deployment.gpu_layers
    on_card = standing.device.kind is not DeviceKind.CPU
    if on_card and shape is not None and layers is not None and layers < (every := all_gpu_layers(shape)):
        parts.append(f"{layers} of {every} layers on the card, the rest on the processor: slower")
    if shape is not None and assignment.settings.context > shape.context_trained:
        parts.append(
            f"its context of {assignment.settings.context} is beyond the {shape.context_trained} it was trained for"
        )
    return "; ".join(parts)


def _why_here(standing: Standing, standings: Sequence[Standing], entry: ModelEntry, deployment: Deployment) -> str:
    if deployment.device is not None:
        return f"pinned to {deployment.device}"
    rivals = [
        each
        for each in standings
        if each is not standing and not each.here and each.costs and each.costs[0].need <= each.left
    ]
    on_cpu = standing.device.kind is DeviceKind.CPU
    if not rivals:
        cards = [each for each in standings if each.device.kind is not DeviceKind.CPU]
        if on_cpu and cards:
            barred_by = [each.device.why_not(entry.kind) for each in cards]
            why = "no GPU has room" if None in barred_by else f"no GPU can be used: {barred_by[0]}"
            return f"{why}; small enough to be useful on a CPU"
        return "the only device with room" if len(standings) > 1 else "the only device"
    if not on_cpu and all(each.device.kind is DeviceKind.CPU for each in rivals):
        gpus = sum(each.device.kind is not DeviceKind.CPU for each in standings)
        return "the only GPU with room" if gpus > 1 else "a GPU answers faster than a CPU"
    if entry.kind is not ModelKind.CHAT and all(
        each.device.memory_total >= standing.device.memory_total
        for each in rivals
        if each.device.kind is not DeviceKind.CPU
    ):
        return "the smallest card that has room, which leaves larger ones to chat models"
    if all(
        each.device.memory_total <= standing.device.memory_total
        for each in rivals
        if each.device.kind is standing.device.kind
    ):
        return "the largest device with room"
    return "spreads the load over the devices"


def _why_variant(assignment: Assignment, standing: Standing, entry: ModelEntry, deployment: Deployment) -> str:
    if deployment.variant is not None:
        return f"{assignment.variant} as asked"
    if len(entry.variants) < 2:
        return ""
    quality = {each.name: each.quality for each in entry.variants}
    better = [cost for cost in standing.costs if cost.variant.quality > quality.get(assignment.variant, 0)]
    if not better:
        best = max(quality.values())
        fits = (
            "the best quality" if quality.get(assignment.variant) == best else "the best quality that fits this device"
        )
        return f"{assignment.variant} is {fits}"
    least = min(better, key=lambda cost: cost.need)
    free = Bytes(standing.left + assignment.memory.total)
    if least.need > free:
        return f"{assignment.variant} because {least.variant.name} needs {least.need}"
    return f"{least.variant.name} would fit now; a loaded replica is not changed"
