"""What one replica costs on one device, and whether it may go there at all.

Law of this file: pure; one replica and one device at a time, without regard to what else is there. Bytes come from `core.memory`, or from
a measurement once a load was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from tars.core.memory import estimate_replica
from tars.core.records import MeasuredLoad
from tars.core.tuning import sequences_for, settings_for
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceKind,
    DeviceSnapshot,
    KvType,
    MemoryEstimate,
    ModelEntry,
    ModelKind,
    NodeSnapshot,
    RuntimeSettings,
    Variant,
)

CPU_CHAT_MOST = Bytes.gib(5)
"""Weights of a chat model that a CPU may hold unless pinned there. Every token reads all weights once; two channels of DDR4 give about
40 GB/s, so 5 GiB is 7 tokens a second: a person's reading speed. A 7B in 4 bits (4.1 GiB) passes, one in 8 bits does not."""


@dataclass(frozen=True, slots=True)
class MeasuredKey:
    """What a measured load is kept under (design, Placement): a card of the same name and memory takes the same, in whichever PC it is.

    `file` is `<model>:<variant>:<bytes of weights>`: a replaced file is told by its tensors' bytes, which is what memory depends on, and
    no 40 GB have to be hashed before the first plan.
    """

    card: str
    file: str
    context: int
    slots: int
    kv_tokens: int
    kv_type: KvType
    gpu_layers: int


Measured = Mapping[MeasuredKey, Bytes]
"""Bytes that loads really took."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One replica of `variant` on one device."""

    variant: Variant
    memory: MemoryEstimate
    settings: RuntimeSettings

    @property
    def need(self) -> Bytes:
        """Bytes that the planner counts."""
        return self.memory.total


def measured_by_key(loads: Iterable[MeasuredLoad]) -> dict[MeasuredKey, Bytes]:
    """What the nodes of a mesh measured and share, as the planner looks it up."""
    return {
        MeasuredKey(
            card=load.card,
            file=load.file,
            context=load.context,
            slots=load.slots,
            kv_tokens=load.kv_tokens,
            kv_type=load.kv_type,
            gpu_layers=load.gpu_layers,
        ): load.taken
        for load in loads
    }


def alike(device: DeviceSnapshot) -> tuple[object, ...]:
    """All that `cost_on` reads of a device: those that are alike in it cost the same."""
    return (
        device.kind,
        device.name,
        device.memory_total,
        device.compute_capability,
        device.precision,
        device.simulated,
        device.unified_memory,
        device.cpu_threads,
    )


def measured_key(assignment: Assignment, device: DeviceSnapshot) -> MeasuredKey:
    """The key under which what `assignment` really took on `device` is kept."""
    return _key(card_of(device), assignment.model, assignment.variant, assignment.memory, assignment.settings)


def card_of(device: DeviceSnapshot) -> str:
    """The kind of card: its name and total memory. Devices that are alike in both take the same memory for the same load."""
    return f"{device.name} {int(device.memory_total)}"


def _key(card: str, model: str, variant: str, memory: MemoryEstimate, settings: RuntimeSettings) -> MeasuredKey:
    return MeasuredKey(
        card=card,
        file=f"{model}:{variant}:{int(memory.weights)}",
        context=settings.context,
        slots=settings.slots,
        kv_tokens=settings.kv_tokens,
        kv_type=settings.kv_type,
        gpu_layers=settings.gpu_layers,
    )


def cost_on(
    device: DeviceSnapshot, entry: ModelEntry, variant: Variant, deployment: Deployment, measured: Measured
) -> Cost:
    """Bytes and settings of one replica; whether they fit is not asked here."""
    wishes = (
        deployment.context,
        deployment.slots,
        deployment.kv_tokens,
        deployment.kv_type,
        deployment.gpu_layers,
    )
    known = (alike(device), entry.name, entry.kind, variant.name, variant.shape, entry.adapters, entry.draft, wishes)
    settings, memory, key = _estimated(_Load(known, device, entry, variant, deployment))
    taken = measured.get(key)
    if taken is not None and not device.simulated:
        memory = replace(memory, measured=taken)
    return Cost(variant=variant, memory=memory, settings=settings)


@dataclass(frozen=True, slots=True)
class _Load:
    """What an estimate is made from. `known` is all that it depends on, and all by which two are told apart."""

    known: tuple[object, ...]
    device: DeviceSnapshot = field(compare=False)
    entry: ModelEntry = field(compare=False)
    variant: Variant = field(compare=False)
    deployment: Deployment = field(compare=False)


@lru_cache(maxsize=16_384)
def _estimated(load: _Load) -> tuple[RuntimeSettings, MemoryEstimate, MeasuredKey]:
    """Kept: every plan asks the same of the same few kinds of cards."""
    device, entry, variant, deployment = load.device, load.entry, load.variant, load.deployment
    settings = settings_for(
        device,
        entry.kind,
        variant.shape,
        context=deployment.context,
        slots=deployment.slots,
        kv_tokens=deployment.kv_tokens,
        kv_type=deployment.kv_type,
        gpu_layers=deployment.gpu_layers,
    )
    memory = estimate_replica(
        device,
        entry.kind,
        variant.shape,
        settings,
        gpu_layers=deployment.gpu_layers,
        adapters=entry.adapters,
        draft=entry.draft,
    )
    return settings, memory, _key(card_of(device), entry.name, variant.name, memory, settings)


def contradiction(entry: ModelEntry, deployment: Deployment) -> str | None:
    """Why the deployment's wishes cannot be met on any device, whatever its size, as a sentence; None where they can."""
    if not entry.variants:
        return None
    try:
        sequences_for(
            entry.kind,
            entry.variants[0].shape,
            context=deployment.context,
            slots=deployment.slots,
            kv_tokens=deployment.kv_tokens,
        )
    except ValueError as wrong:
        return f"{entry.name}: {wrong}."
    if deployment.gpu_layers is not None and entry.kind is not ModelKind.CHAT:
        return f"{entry.name}: gpu_layers is for chat models; a model for {entry.kind.value} is on a card as a whole, so leave it out."
    return None


def wanted_variants(entry: ModelEntry, deployment: Deployment) -> tuple[Variant, ...]:
    """The variants that the deployment allows, best quality first; empty where it pins one that does not exist."""
    allowed = (
        variant
        for variant in entry.variants
        if deployment.variant is None or variant.name.lower() == deployment.variant.lower()
    )
    return tuple(sorted(allowed, key=lambda variant: (-variant.quality, variant.name)))


def barred(node: NodeSnapshot, device: DeviceSnapshot, entry: ModelEntry, deployment: Deployment) -> str | None:
    """Why nothing of this deployment may go to this device, whatever its size; None where it may."""
    if node.draining:
        return f"{node.name} is draining"
    if deployment.device is not None and not device.is_called(deployment.device):
        return f"pinned to {deployment.device}"
    return device.why_not(entry.kind)


def too_slow(device: DeviceSnapshot, entry: ModelEntry, variant: Variant, deployment: Deployment) -> bool:
    """Whether this is a chat model that a CPU would answer slower than a person reads, and nobody insisted."""
    return (
        device.kind is DeviceKind.CPU
        and entry.kind is ModelKind.CHAT
        and variant.shape.tensor_bytes > CPU_CHAT_MOST
        and deployment.device is None
    )
