"""What would make a replica fit that was refused: a smaller wish, a part of it on the processor, memory to free.

Law of this file: pure; it advises and decides nothing. Every remedy is checked against the same costs that the planner counts: one that is
named fits. Why a device has no room is `placement_reasons`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tars.core.placement_cost import Cost, alike, barred, cost_on, too_slow, wanted_variants
from tars.core.placement_reasons import Standing
from tars.core.tuning import SLOTS_MOST, all_gpu_layers
from tars.core.types import (
    Bytes,
    Deployment,
    DeviceKind,
    DeviceVerdict,
    KvType,
    ModelEntry,
    ModelKind,
    Refusal,
    Variant,
)

REMEDIES_MOST = 3
"""More than three ways out are a list, not advice."""
GPU_SHARE_LEAST = 4
"""A card that holds less than one in so many layers speeds an answer up by less than a third: not worth proposing."""
CONTEXT_LEAST = 512
"""A shorter context holds hardly a question and its answer; it is not worth proposing."""


def refusal_of(
    missing: int,
    standings: Sequence[Standing],
    verdicts: tuple[DeviceVerdict, ...],
    entry: ModelEntry,
    deployment: Deployment,
    *,
    would_fit_fresh: bool,
) -> Refusal:
    """The refusal of `missing` replicas, with what would make (at least one more of) them fit."""
    return Refusal(entry.name, missing, verdicts, _remedy(standings, entry, deployment, would_fit_fresh))


def _remedy(standings: Sequence[Standing], entry: ModelEntry, deployment: Deployment, would_fit_fresh: bool) -> str:
    if not wanted_variants(entry, deployment):
        known = ", ".join(variant.name for variant in entry.variants)
        return f"{entry.name} has no variant {deployment.variant}; it has: {known}."
    if not standings:
        return "There is no device: start tars-node on a PC with a GPU, or allow the CPU ([devices] cpu = true)."
    if deployment.device is not None and not any(each.device.is_called(deployment.device) for each in standings):
        known = ", ".join(sorted({each.device.name for each in standings}))
        return f"No device is called {deployment.device}; there are: {known}."
    usable = [each for each in standings if barred(each.node, each.device, entry, deployment) is None]
    if not usable:
        engines = sorted({why for each in standings if (why := each.device.why_not(entry.kind)) is not None})
        if engines:
            return f"{engines[0][:1].upper()}{engines[0][1:]}."
        return "Every device it may use is on a node that drains: resume one (node.resume) or add a PC."
    failed = [each for each in usable if each.smallest.variant.name in each.bars and each.smallest.need <= each.left]
    if failed:
        reason = failed[0].bars[failed[0].smallest.variant.name]
        return f"On {failed[0].place} {reason}. `tars deploy {entry.name}` tries again at once."
    found = list(_smaller_wishes(usable, entry, deployment))[:REMEDIES_MOST]
    if len(found) < REMEDIES_MOST:
        found += _partly_on_a_card(usable, standings, entry, deployment)
    if would_fit_fresh:
        found.append(
            "if everything were placed anew it would fit: remove a model that is in the way and deploy it again"
        )
    if len(found) < REMEDIES_MOST:
        found += _more_memory(usable, entry, deployment)
    if found:
        text = "; or ".join(found)
        return f"{text[:1].upper()}{text[1:]}."
    cards = [each for each in usable if each.device.kind is not DeviceKind.CPU] or usable
    least = min(cards, key=lambda each: each.smallest.need)
    largest = max(cards, key=lambda each: each.device.capacity)
    return (
        f"No device here is large enough: it needs {least.smallest.need} ({least.smallest.variant.name}) and {largest.place} "
        f"offers {largest.device.capacity}, the most. Add a larger card, or choose a smaller model."
    )


def _smaller_wishes(usable: Sequence[Standing], entry: ModelEntry, deployment: Deployment) -> Iterator[str]:
    """Changes of the deployment, the mildest first, each of which fits somewhere; combinations only where nothing single does."""
    found = False
    for text, changed, replaces_all in _changes(usable, entry, deployment):
        spot = _fits_where(usable, entry, changed, replaces_all=replaces_all)
        if spot is not None:
            found = True
            yield f"set {text}: {_spot(spot)}"
    if found or entry.kind is not ModelKind.CHAT:
        return
    smallest = min(entry.variants, key=lambda each: each.shape.tensor_bytes).name
    # Where the slots share one context already, there is nothing to share.
    shared = deployment.kv_tokens is not None or (deployment.slots or 1) > 1
    for context in _contexts(usable):
        for kv_type in (KvType.Q8_0, KvType.Q4_0):
            changed = replace(
                deployment,
                context=context,
                kv_type=kv_type,
                kv_tokens=context if shared else None,
                variant=None if deployment.variant is None else smallest,
            )
            spot = _fits_where(usable, entry, changed, replaces_all=False)
            if spot is not None:
                kv_tokens = f", kv_tokens = {context}" if shared else ""
                variant = f', variant = "{smallest}"' if changed.variant != deployment.variant else ""
                yield f'set context = {context}, kv_type = "{kv_type}"{kv_tokens}{variant}: {_spot(spot)}'
                return


def _spot(spot: tuple[Standing, Cost, Bytes]) -> str:
    standing, cost, free = spot
    return f"fits on {standing.place} ({cost.need} of {free} free)"


def _changes(
    usable: Sequence[Standing], entry: ModelEntry, deployment: Deployment
) -> Iterator[tuple[str, Deployment, bool]]:
    """(what to write, the changed deployment, whether it takes the place of all the model's replicas)."""
    asked = usable[0].smallest.settings
    if entry.kind is ModelKind.CHAT and deployment.replicas > 1:
        # As many sequences as the replicas together, and as many tokens of them.
        slots = min(SLOTS_MOST, deployment.replicas * asked.slots)
        kv_tokens = min(deployment.replicas * asked.kv_tokens, slots * asked.context)
        sharing = f", kv_tokens = {kv_tokens}" if kv_tokens < slots * asked.context else ""
        changed = replace(deployment, replicas=1, slots=slots, kv_tokens=kv_tokens if sharing else None)
        yield f"replicas = 1 with slots = {slots}{sharing}", changed, True
    if deployment.variant is not None:
        pinned = wanted_variants(entry, deployment)[0]
        for variant in sorted(entry.variants, key=lambda each: -each.quality):
            if variant.shape.tensor_bytes < pinned.shape.tensor_bytes:
                yield f'variant = "{variant.name}"', replace(deployment, variant=variant.name), False
    if entry.kind is not ModelKind.CHAT:
        return
    kv_tokens = asked.kv_tokens
    while kv_tokens > asked.context:
        # Sharing keeps the number of answers at once, which fewer slots would not.
        kv_tokens = max(asked.context, kv_tokens // 2)
        changed = replace(deployment, slots=asked.slots, kv_tokens=kv_tokens)
        if _fits_where(usable, entry, changed, replaces_all=False) is not None:
            yield f"kv_tokens = {kv_tokens} for all {asked.slots} slots instead of {asked.kv_tokens}", changed, False
            break
    if deployment.kv_type is KvType.F16:
        yield 'kv_type = "q8_0"', replace(deployment, kv_type=KvType.Q8_0), False
    for context in _contexts(usable):
        kv_tokens = min(asked.kv_tokens, asked.slots * context)
        named = deployment.kv_tokens is not None and kv_tokens != deployment.kv_tokens
        changed = replace(deployment, context=context, kv_tokens=kv_tokens if named else deployment.kv_tokens)
        if _fits_where(usable, entry, changed, replaces_all=False) is not None:
            also = f" with kv_tokens = {kv_tokens}" if named else ""
            yield f"context = {context} instead of {asked.context}{also}", changed, False
            break


def _partly_on_a_card(
    usable: Sequence[Standing], standings: Sequence[Standing], entry: ModelEntry, deployment: Deployment
) -> list[str]:
    """The most layers that a card can take, where the rest finds room in its PC's RAM; not where a replica has all of them on one."""
    if entry.kind is not ModelKind.CHAT or any(each.here for each in standings):
        return []
    found: list[tuple[int, str, str]] = []
    for standing in usable:
        if standing.device.kind is DeviceKind.CPU or standing.device.unified_memory:
            continue
        host = next(
            (each.left for each in standings if each.node is standing.node and each.device.kind is DeviceKind.CPU), 0
        )
        variant = min(wanted_variants(entry, deployment), key=lambda each: each.shape.tensor_bytes)
        every = all_gpu_layers(variant.shape)
        layers, cost = _most_layers(standing, entry, variant, deployment, every)
        if cost is not None and variant.shape.tensor_bytes - cost.memory.weights <= host:
            more = f', variant = "{variant.name}"' if len(wanted_variants(entry, deployment)) > 1 else ""
            text = (
                f"set gpu_layers = {layers}{more}: {layers} of {every} layers fit on {standing.place} "
                f"({cost.need} of {standing.left} free), the rest runs on its processor, slower"
            )
            found.append((-layers, standing.device.id, text))
    return [text for _, _, text in sorted(found)[:1]]


def _most_layers(
    standing: Standing, entry: ModelEntry, variant: Variant, deployment: Deployment, every: int
) -> tuple[int, Cost | None]:
    """The most layers, fewer than all, that fit what is left, and their cost; each layer more needs more. No cost: too few would fit."""
    fits: tuple[int, Cost | None] = (0, None)
    least, most = every // GPU_SHARE_LEAST, every - 1
    while least <= most:
        layers = (least + most) // 2
        cost = cost_on(standing.device, entry, variant, replace(deployment, gpu_layers=layers), {})
        if cost.need <= standing.left:
            fits, least = (layers, cost), layers + 1
        else:
            most = layers - 1
    return fits


def _contexts(usable: Sequence[Standing]) -> Iterator[int]:
    context = usable[0].smallest.settings.context // 2
    while context >= CONTEXT_LEAST:
        yield context
        context //= 2


def _fits_where(
    usable: Sequence[Standing], entry: ModelEntry, changed: Deployment, *, replaces_all: bool
) -> tuple[Standing, Cost, Bytes] | None:
    """The device with the most room left where the changed deployment fits, its cost there, and what is free."""
    spots = []
    variants = wanted_variants(entry, changed)
    known: dict[tuple[object, ...], list[Cost]] = {}
    for standing in usable:
        free = Bytes(standing.left + (standing.taken if replaces_all else 0))
        kind = alike(standing.device)
        if kind not in known:
            known[kind] = [cost_on(standing.device, entry, variant, changed, {}) for variant in variants]
        for variant, cost in zip(variants, known[kind], strict=True):
            if variant.name in standing.bars:
                continue
            if cost.need <= free and not too_slow(standing.device, entry, variant, changed):
                spots.append((standing, cost, free))
                break
    gpu_first = sorted(
        spots, key=lambda spot: (spot[0].device.kind is DeviceKind.CPU, spot[1].need - spot[2], spot[0].device.id)
    )
    return gpu_first[0] if gpu_first else None


def _more_memory(usable: Sequence[Standing], entry: ModelEntry, deployment: Deployment) -> list[str]:
    """What to free, where that can help: the card itself, without reserve and cap, is large enough."""
    found = []
    short = []
    for each in usable:
        device = each.device
        hard = min(device.memory_total - device.reserve, device.memory_total if device.cap is None else device.cap)
        slow = too_slow(device, entry, each.smallest.variant, deployment)
        if each.smallest.need <= hard and not slow and each.smallest.need > each.left:
            short.append((each.smallest.need - each.left, device.id, each))
        elif slow and each.smallest.need <= each.left:
            found.append(f'set device = "cpu": {each.place} takes it, slowly')
    if short:
        missing, _, each = min(short, key=lambda one: one[:2])
        holders = [*([entry.name] if each.here else []), *each.others]
        if each.foreign:
            holders.append("other programs" if holders else "programs beside TARS")
        if each.device.cap is not None and each.device.capacity == each.device.cap:
            holders.append("the operator's cap")
        among = f", where {' and '.join(holders)} hold memory" if holders else ""
        found.insert(0, f"free {_at_least(Bytes(missing))} more on {each.place}{among}")
    return found[:1]


def _at_least(missing: Bytes) -> Bytes:
    """Rounded up to what is shown, so that freeing the bytes that are named is enough."""
    unit = 2**30 // 10 if missing >= 2**30 else 2**20
    return Bytes(-(-missing // unit) * unit)
