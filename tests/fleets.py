"""Devices, nodes and models for tests of planning: the cards and models of the field notes, and random fleets."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tars.core.tensor_plan import Counts, planned_shape
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    ModelKind,
    ModelShape,
    NodeId,
    NodeSnapshot,
    Plan,
    Variant,
)

QUALITY = {"fp32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q4_K_M": 4.8}
CARDS = {
    "RTX 4090": (24080, (8, 9)),
    "RTX 3060": (11909, (8, 6)),
    "GTX 1660 SUPER": (5930, (7, 5)),
}
"""MiB as CUDA shows them, compute capability."""


def chat_model(name: str, counts: Counts, *quantisations: str) -> ModelEntry:
    variants = tuple(Variant(each, planned_shape(counts, each), QUALITY[each]) for each in quantisations)
    return ModelEntry(name, ModelKind.CHAT, variants)


def encoder(name: str, layers: int, embedding: int, file_bytes: int) -> ModelEntry:
    shape = ModelShape(
        architecture="bert",
        layers=layers,
        embedding=embedding,
        heads=12,
        kv_heads=12,
        feed_forward=4 * embedding,
        vocabulary=30522,
        key_length=embedding // 12,
        value_length=embedding // 12,
        context_trained=256,
        tensor_bytes=Bytes(file_bytes),
        host_bytes=Bytes(0),
        file_bytes=Bytes(file_bytes),
    )
    return ModelEntry(name, ModelKind.EMBEDDING, (Variant("fp32", shape, QUALITY["fp32"]),), aliases=(f"{name}-alias",))


MODELS = {
    entry.name: entry
    for entry in (
        chat_model("mistral-7b", Counts("llama", 32, 4096, 32, 8, 14336, 32000, 32768), "Q4_K_M"),
        chat_model("llama-2-7b", Counts("llama", 32, 4096, 32, 32, 11008, 32000, 4096), "Q4_K_M"),
        chat_model("llama-3.1-8b", Counts("llama", 32, 4096, 32, 8, 14336, 128256, 131072), "Q8_0", "Q4_K_M"),
        chat_model("llama-3.1-70b", Counts("llama", 80, 8192, 64, 8, 28672, 128256, 131072), "Q4_K_M"),
        chat_model("deepseek-33b", Counts("llama", 62, 7168, 56, 8, 19200, 32256, 16384), "Q4_K_M"),
        chat_model("phi-3-mini", Counts("phi3", 32, 3072, 32, 32, 8192, 32064, 4096), "Q8_0", "Q4_K_M"),
        chat_model("phi-2", Counts("phi2", 32, 2560, 32, 32, 10240, 51200, 2048), "Q8_0"),
        chat_model("stablelm-3b", Counts("stablelm", 32, 2560, 32, 32, 6912, 50304, 4096), "Q8_0"),
        chat_model("qwen-0.5b", Counts("qwen2", 24, 896, 14, 2, 4864, 151936, 32768, tied=True), "Q4_K_M"),
        encoder("minilm", 6, 384, 90_868_376),
        encoder("nomic", 12, 768, 546_938_168),
    )
}


def gpu(
    node: str,
    card: str = "RTX 3060",
    *,
    number: int = 0,
    free_mib: int | None = None,
    held: int = 0,
    cap_mib: int | None = None,
) -> DeviceSnapshot:
    total, capability = CARDS[card]
    return DeviceSnapshot(
        id=DeviceId(f"{node}/gpu-{number}"),
        node=NodeId(node),
        kind=DeviceKind.CUDA,
        name=card,
        memory_total=Bytes.mib(total),
        memory_free=Bytes.mib(total if free_mib is None else free_mib),
        memory_held=Bytes(held),
        reserve=Bytes.mib(512),
        cap=None if cap_mib is None else Bytes.mib(cap_mib),
        compute_capability=capability,
    )


def cpu(node: str, gib: int = 16) -> DeviceSnapshot:
    return DeviceSnapshot(
        id=DeviceId(f"{node}/cpu"),
        node=NodeId(node),
        kind=DeviceKind.CPU,
        name="CPU",
        memory_total=Bytes.gib(gib),
        memory_free=Bytes.gib(gib - 2),
        reserve=Bytes.gib(2),
        cpu_threads=4,
    )


def node(name: str, *devices: DeviceSnapshot, draining: bool = False) -> NodeSnapshot:
    return NodeSnapshot(NodeId(name), name, devices, draining=draining)


def holding(nodes: Sequence[NodeSnapshot], assignments: Iterable[Assignment]) -> list[NodeSnapshot]:
    """The nodes once the assignments are loaded: held by TARS, no longer free."""
    taken: dict[str, int] = {}
    for assignment in assignments:
        taken[assignment.device] = taken.get(assignment.device, 0) + assignment.memory.total
    return [
        replace(
            each,
            devices=tuple(
                replace(
                    device,
                    memory_held=Bytes(taken.get(device.id, 0)),
                    memory_free=Bytes(max(0, device.memory_free - taken.get(device.id, 0))),
                )
                for device in each.devices
            ),
        )
        for each in nodes
    ]


def random_fleet(seed: int, *, fill: float = 0.8) -> tuple[list[NodeSnapshot], list[Deployment]]:
    """2 to 10 PCs with a card each, and deployments that ask for about `fill` of their memory."""
    rng = random.Random(seed)
    nodes = []
    for number in range(rng.randint(2, 10)):
        card = rng.choice(list(CARDS))
        total = CARDS[card][0]
        nodes.append(node(f"pc{number}", gpu(f"pc{number}", card, free_mib=int(total * rng.uniform(0.7, 1.0)))))
    left = fill * sum(device.capacity for each in nodes for device in each.devices)
    wanted: dict[str, Deployment] = {}
    names = [name for name in MODELS if name != "llama-3.1-70b"]
    for _ in range(60):
        name = rng.choice(names)
        least = min(variant.shape.tensor_bytes for variant in MODELS[name].variants) + Bytes.mib(900)
        if least > left:
            continue
        left -= least
        known = wanted.get(name)
        context = known.context if known else rng.choice([1024, 2048, 4096])
        wanted[name] = Deployment(name, replicas=known.replicas + 1 if known else 1, context=context)
    return nodes, list(wanted.values())


def bytes_by_device(plan: Plan) -> dict[str, int]:
    taken: dict[str, int] = {}
    for assignment in plan.assignments:
        taken[assignment.device] = taken.get(assignment.device, 0) + assignment.memory.total
    return taken


def check_plan(plan: Plan, nodes: Sequence[NodeSnapshot], deployments: Sequence[Deployment]) -> None:
    """What holds of every plan: within capacity, nothing on draining nodes, every replica placed or refused, ids unique."""
    devices = {device.id: (each, device) for each in nodes for device in each.devices}
    for device, taken in bytes_by_device(plan).items():
        assert taken <= devices[DeviceId(device)][1].capacity, f"{device} is over-committed"
    for assignment in plan.assignments:
        home, device = devices[assignment.device]
        assert assignment.node == home.id == device.node
        assert not home.draining
        assert assignment.reason
    replicas = [assignment.replica for assignment in plan.assignments]
    assert len(set(replicas)) == len(replicas)
    missing = {refusal.model: refusal.replicas_missing for refusal in plan.refusals}
    for deployment in deployments:
        placed = sum(assignment.model == deployment.model for assignment in plan.assignments)
        assert placed + missing.get(deployment.model, 0) == deployment.replicas
        assert [verdict.device for verdict in plan.verdicts[deployment.model]] == sorted(devices)
    for refusal in plan.refusals:
        assert refusal.remedy
    for verdicts in plan.verdicts.values():
        for verdict in verdicts:
            assert verdict.reason
            assert not verdict.accepted or verdict.needed <= verdict.free
