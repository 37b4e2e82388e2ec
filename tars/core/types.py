"""Ids, units and snapshots that every decision is made from.

Law of this file: frozen values only. Nothing here reads a clock, a file or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

NodeId = NewType("NodeId", str)
"""UUID of a node, kept in its state folder; never the host's name."""
DeviceId = NewType("DeviceId", str)
"""`<NodeId>/gpu-<NVML uuid>`, `<NodeId>/cpu` or `<NodeId>/sim-<index>`: unique in the mesh."""
ReplicaId = NewType("ReplicaId", str)
"""`<model>@<device suffix>#<n>`: unique in the mesh, stable over a worker's restarts."""


class Bytes(int):
    """A number of bytes. Never a plain int in a signature, so that MiB and GB cannot be mixed up."""

    @classmethod
    def mib(cls, mebibytes: float) -> Bytes:
        """Bytes of `mebibytes` x 2**20, rounded up."""
        return cls(-int(-mebibytes * 2**20 // 1))

    @classmethod
    def gib(cls, gibibytes: float) -> Bytes:
        """Bytes of `gibibytes` x 2**30, rounded up."""
        return cls.mib(gibibytes * 1024)

    @property
    def in_mib(self) -> float:
        """The same in MiB (2**20)."""
        return self / 2**20

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: Callable[[object], Any]) -> Any:
        """A checked integer where a message or a record has one; a dictionary by pydantic's protocol, so that nothing is imported here."""
        return {"type": "function-after", "function": {"type": "no-info", "function": cls}, "schema": handler(int)}

    def __str__(self) -> str:
        """For people: `5.1 GiB`, `374 MiB`, `12 KiB`."""
        if abs(self) >= 2**30:
            return f"{self / 2**30:.1f} GiB"
        if abs(self) >= 2**20:
            return f"{self / 2**20:.0f} MiB"
        return f"{self / 2**10:.0f} KiB"


class ModelKind(StrEnum):
    """What a model is called for."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    RERANK = "rerank"


class DeviceKind(StrEnum):
    """How a device computes."""

    CUDA = "cuda"
    CPU = "cpu"


class Precision(StrEnum):
    """The floating-point precision that a device is good at (field notes: bf16 from cc 8.0, fp16 with tensor cores from 7.0)."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class KvType(StrEnum):
    """Element type of the KV cache. A quantised V needs flash attention."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """One device at one moment. Every field a probe could not read is None, never a guess.

    `memory_held` is what TARS itself holds there now, so that capacity = min(free + held, total - reserve, cap) (design, Placement).
    `simulated` devices have a declared memory and compute on the CPU; every face labels them so.
    """

    id: DeviceId
    node: NodeId
    kind: DeviceKind
    name: str
    memory_total: Bytes
    memory_free: Bytes
    memory_held: Bytes = Bytes(0)
    reserve: Bytes = Bytes(0)
    cap: Bytes | None = None
    compute_capability: tuple[int, int] | None = None
    precision: Precision = Precision.FP32
    temperature_celsius: int | None = None
    utilisation_percent: int | None = None
    power_watts: float | None = None
    driver: str | None = None
    index: int | None = None
    """CUDA ordinal, None on CPU and simulated devices."""
    simulated: bool = False
    unified_memory: bool = False
    """True where the device shares the host's RAM (NVML says NotSupported for memory)."""
    cpu_threads: int | None = None
    cannot_run: tuple[tuple[ModelKind, str], ...] = ()
    """Kinds of model that the engines installed on this node cannot run on this device, each with the reason and what to do."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as `WSL2: per-process memory is not available`."""

    def is_called(self, words: str) -> bool:
        """Whether an operator's words mean this device: its id, the id's last part (`cpu`), or its name with or without the maker."""
        words = words.strip().casefold()
        name = self.name.casefold()
        short = name.removeprefix("nvidia ").removeprefix("geforce ")
        return words in (self.id.casefold(), self.id.rpartition("/")[2].casefold(), name, short, f"geforce {short}")

    def why_not(self, kind: ModelKind) -> str | None:
        """Why no model of this kind can run here; None where one can."""
        return next((reason for barred, reason in self.cannot_run if barred is kind), None)

    @property
    def capacity(self) -> Bytes:
        """Bytes that TARS may hold here in all, its own replicas included; never negative."""
        most = min(self.memory_free + self.memory_held, self.memory_total - self.reserve)
        if self.cap is not None:
            most = min(most, self.cap)
        return Bytes(max(0, most))


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """One node and its devices at one moment."""

    id: NodeId
    name: str
    devices: tuple[DeviceSnapshot, ...] = ()
    draining: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a transformer decides its memory: counts, no weights. Source: the GGUF header, or config.json for embeddings.

    `tensor_bytes` is the sum over tensors of block-padded bytes; `host_bytes` the part that stays on the host when every
    layer is offloaded (`token_embd`). `experts` > 0 for mixtures.
    """

    architecture: str
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    key_length: int
    value_length: int
    context_trained: int
    tensor_bytes: Bytes
    host_bytes: Bytes
    file_bytes: Bytes
    experts: int = 0
    layer_bytes: tuple[int, ...] = ()
    """Of each layer, the first one first, where the tensors are known; what is neither there nor on the host is the output layer's."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One quantisation of a model: a file (or folder) and its shape. `quality` orders variants, higher is better."""

    name: str
    """`Q4_K_M`, `Q8_0`, `fp32`."""
    shape: ModelShape
    quality: float
    repo: str | None = None
    file: str | None = None
    sha256: str | None = None
    local: bool = False
    """True where this node has the file."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of a model: calls name it as `<model>:<name>`. `scale` multiplies what it changes."""

    name: str
    scale: float
    file_bytes: Bytes


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A catalogue entry: what can be deployed. Variants are ordered best quality first."""

    name: str
    kind: ModelKind
    variants: tuple[Variant, ...]
    aliases: tuple[str, ...] = ()
    description: str = ""
    licence: str = ""
    adapters: tuple[Adapter, ...] = ()
    draft: ModelShape | None = None
    """Of the small model of the same vocabulary that proposes tokens, where one is named."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What somebody wants: `replicas` loaded copies of a model. Replicated to every node (a later issue); saved on each.

    `context` None means the model's trained context, at most 4,096 (the planner's default). `slots` sequences are served at once, and
    `kv_tokens` tokens of them in all are in the KV cache; with `slots` None it is `tuning.SLOTS` sharing one context, else every slot
    has its whole context unless `kv_tokens` says fewer. `gpu_layers` None puts every layer on the card.
    `variant` and `device` pin a choice that the planner otherwise makes (`device`: a DeviceId, a device's name, or `cpu`).
    """

    model: str
    replicas: int = 1
    context: int | None = None
    slots: int | None = None
    kv_tokens: int | None = None
    kv_type: KvType = KvType.F16
    gpu_layers: int | None = None
    variant: str | None = None
    device: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """How an engine runs one replica on one device; made by `core.tuning`, carried out by `workers/`."""

    context: int
    slots: int = 1
    kv_tokens: int = 0
    """Tokens in the KV cache in all; fewer than slots x context are shared by the slots. 0: a model without a KV cache."""
    gpu_layers: int = 0
    """As llama.cpp counts them, the output layer first; -1: all of them."""
    threads: int = 1
    batch: int = 512
    micro_batch: int = 512
    flash_attention: bool = False
    kv_type: KvType = KvType.F16
    mmap: bool = True
    precision: Precision = Precision.FP32
    batch_tokens: int = 4096
    """Embeddings: tokens in one forward pass at most."""

    @property
    def shares_kv(self) -> bool:
        """Whether the slots share one KV cache instead of having one each."""
        return 0 < self.kv_tokens < self.slots * self.context


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one replica on its device, by part. `measured` replaces the sum once a load was measured."""

    weights: Bytes
    kv_cache: Bytes
    compute: Bytes
    overhead: Bytes
    """CUDA context, or the process itself on a CPU."""
    measured: Bytes | None = None

    @property
    def total(self) -> Bytes:
        """What the planner counts with."""
        return (
            self.measured
            if self.measured is not None
            else Bytes(self.weights + self.kv_cache + self.compute + self.overhead)
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """One replica on one device, with the reason."""

    replica: ReplicaId
    model: str
    variant: str
    device: DeviceId
    node: NodeId
    memory: MemoryEstimate
    settings: RuntimeSettings
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceVerdict:
    """Why a model went, or did not go, to one device. `needed` and `free` are what was compared."""

    device: DeviceId
    device_name: str
    variant: str
    accepted: bool
    needed: Bytes
    free: Bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A replica that fits nowhere: never loaded in hope. `remedy` says what would make it fit."""

    model: str
    replicas_missing: int
    verdicts: tuple[DeviceVerdict, ...]
    remedy: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Which replica goes on which device and why; and why not elsewhere. Same snapshot, same plan, on every node."""

    assignments: tuple[Assignment, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    verdicts: Mapping[str, tuple[DeviceVerdict, ...]] = field(default_factory=dict)
    """By model: the verdict of every device for that model."""


class ReplicaState(StrEnum):
    """Life of a replica, as its supervisor sees it."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    """The worker died or hung; it comes back after a backoff."""
    FAILED = "failed"
    """Given up: the model cannot be loaded (bad file), a person must act."""
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on this process's monotonic clock, in seconds. Across hops only the budget left travels (`timeout_ms`)."""

    at: float

    def remaining(self, now: float) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - now)

    def passed(self, now: float) -> bool:
        """True when nothing is left."""
        return now >= self.at
