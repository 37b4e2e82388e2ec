"""PCs and models for simulations: unlike cards, seeded; and what each model really takes, which no estimate says exactly.

Law of this file: values from dice, nothing else. Ids are random, so that their order says nothing about who came first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from tars.core.tensor_plan import Counts, planned_shape
from tars.core.types import (
    Assignment,
    Bytes,
    DeviceId,
    DeviceKind,
    DeviceSnapshot,
    ModelEntry,
    ModelKind,
    ModelShape,
    NodeId,
    Variant,
)

CARDS: dict[str, tuple[int, tuple[int, int]]] = {
    "RTX 4090": (24080, (8, 9)),
    "RTX 3060": (11909, (8, 6)),
    "GTX 1660 SUPER": (5930, (7, 5)),
}
"""MiB as CUDA shows them, compute capability."""
RESERVE = Bytes.mib(512)
MOST_ERROR = 0.02
"""Estimates err by so much of a load at most. `tests/core/test_memory.py` holds the real ones to about as much."""


def _chat(name: str, counts: Counts, *quantisations: str) -> ModelEntry:
    quality = {"F16": 16.0, "Q8_0": 8.5, "Q4_K_M": 4.8}
    variants = tuple(
        Variant(each, planned_shape(counts, each), quality[each], repo=f"somebody/{name}", file=f"{name}.{each}.gguf")
        for each in quantisations
    )
    return ModelEntry(name, ModelKind.CHAT, variants)


def _encoder(name: str, layers: int, embedding: int, size: int) -> ModelEntry:
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
        tensor_bytes=Bytes(size),
        host_bytes=Bytes(0),
        file_bytes=Bytes(size),
    )
    variant = Variant("fp32", shape, 32.0, repo=f"somebody/{name}", file="model.safetensors")
    return ModelEntry(name, ModelKind.EMBEDDING, (variant,))


@cache
def models() -> dict[str, ModelEntry]:
    """The catalogue of every simulation: from 1 to 17 GiB on a card."""
    entries = (
        _chat("mistral-7b", Counts("llama", 32, 4096, 32, 8, 14336, 32000, 32768), "Q4_K_M"),
        _chat("llama-3.1-8b", Counts("llama", 32, 4096, 32, 8, 14336, 128256, 131072), "Q8_0", "Q4_K_M"),
        _chat("phi-3-mini", Counts("phi3", 32, 3072, 32, 32, 8192, 32064, 4096), "Q8_0", "Q4_K_M"),
        _chat("deepseek-33b", Counts("llama", 62, 7168, 56, 8, 19200, 32256, 16384), "Q4_K_M"),
        _chat("qwen-0.5b", Counts("qwen2", 24, 896, 14, 2, 4864, 151936, 32768, tied=True), "Q4_K_M"),
        _encoder("minilm", 6, 384, 90_868_376),
        _encoder("nomic", 12, 768, 546_938_168),
    )
    return {entry.name: entry for entry in entries}


@dataclass(frozen=True, slots=True)
class Pc:
    """One simulated PC as it was bought: a node runs on it, or will."""

    name: str
    node: NodeId
    devices: tuple[DeviceSnapshot, ...]
    priority: int = 0

    @property
    def address(self) -> str:
        return f"{self.name}:8001"


def pc(dice: random.Random, number: int) -> Pc:
    """A PC with one card, seldom two, sometimes a CPU that counts, sometimes nothing but that."""
    node = NodeId(f"{dice.getrandbits(32):08x}")
    cards = [dice.choice(list(CARDS)) for _ in range(dice.choice((0, 1, 1, 1, 1, 1, 2)))]
    devices = [
        DeviceSnapshot(
            id=DeviceId(f"{node}/gpu-{index}"),
            node=node,
            kind=DeviceKind.CUDA,
            name=card,
            memory_total=Bytes.mib(CARDS[card][0]),
            memory_free=Bytes.mib(CARDS[card][0]),
            reserve=RESERVE,
            compute_capability=CARDS[card][1],
            index=index,
        )
        for index, card in enumerate(cards)
    ]
    if not cards or dice.random() < 0.2:
        devices.append(
            DeviceSnapshot(
                id=DeviceId(f"{node}/cpu"),
                node=node,
                kind=DeviceKind.CPU,
                name="CPU",
                memory_total=Bytes.gib(16),
                memory_free=Bytes.gib(16),
                reserve=Bytes.gib(2),
                cpu_threads=4,
            )
        )
    return Pc(f"pc{number}", node, tuple(devices), priority=dice.choice((0, 0, 0, 1)))


def content_of(assignment: Assignment) -> str:
    """What a replica was loaded from: equal ones compute the same."""
    return f"{assignment.model}.{assignment.variant}"


def really_taken(seed: int, card: str, model: str, variant: str, estimate: int) -> Bytes:
    """What a load really takes on a kind of card: the estimate and an error of up to `MOST_ERROR`, the same for every load of its kind."""
    error = random.Random(f"{seed}/{card}/{model}/{variant}").uniform(-MOST_ERROR, MOST_ERROR)
    return Bytes(int(estimate * (1.0 + error)))
