"""How a model should run on a device: a device and a shape in, run-time settings out.

Law of this file: pure decisions, each constant with its reason. What is measured per device at load time (flash attention, threads)
may replace these defaults; nothing here measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.core.types import Bytes, DeviceKind, DeviceSnapshot, KvType, ModelKind, ModelShape, Precision, RuntimeSettings

CONTEXT_MOST = 4096
"""Tokens of a sequence unless somebody asks for more: a 7B with it fits an 8 GB card; a trained 128k would cost 16 GiB of KV."""
SLOTS = 4
"""Sequences of a chat model computed at once unless somebody says how many: they share the KV cache of one context, so that they cost
no memory. A decode step reads all weights whether it serves one or four; most calls are far shorter than the context."""
MICRO_BATCH_CUDA = 512
"""llama.cpp's own default: larger ones speed a prefill up by little and grow the compute buffer in proportion."""
MICRO_BATCH_CPU = 256
"""Half of llama.cpp's default. The compute buffer on a CPU grows with it, and chunks of about 96 tokens are prefilled anyway (field
notes, Engines), so that more would be reserved and never used."""
SLOTS_MOST = 256
"""llama.cpp's LLAMA_MAX_SEQ."""
BATCH_LEAST = 512
"""Tokens that one `llama_decode` may carry: at least one chunk of prefill and one token for each slot."""
BATCH_TOKENS_CUDA = 16384
"""Embeddings: a card needs thousands of tokens in flight to be busy."""
BATCH_TOKENS_CPU = 4096
"""Embeddings: the budget measured best or near it on a CPU (field notes, Embeddings: 1,024 to 8,192 within a quarter of each other)."""
BATCH_TOKENS_SMALL_CARD = 8192
"""Embeddings on a card below 8 GiB: half the activations, so that a chat model fits beside them."""
SMALL_CARD_BYTES = 8 * 2**30
THREADS_MOST = 64
"""llama.cpp loses speed to its barriers beyond a socket; more threads than this only wait."""
FLASH_ATTENTION_FROM = (7, 0)
"""Compute capability. Below Volta llama.cpp has no fast kernel for it. 1660 Super is 7.5."""
BF16_FROM = (8, 0)
"""Compute capability. `torch.cuda.is_bf16_supported()` says True on Turing too, by emulation (field notes, Devices)."""
FP16_FROM = (7, 0)
"""Compute capability of the first tensor cores."""
NO_TENSOR_CORES = ("GTX 16", "GTX 10", "GTX 9", "MX450", "MX550", "T400", "T500", "T600", "T1000", "T1200")
"""Turing boards of cc 7.5 without tensor cores, and their elders: half precision can give NaN there (field notes, Devices)."""


BYTES_A_THREAD = Bytes.mib(16)
"""Weights that make one more CPU thread worth it: about 2 ms of memory traffic a token. Below that llama.cpp's barriers after every
operation cost more than the work between them, and beside other busy programs they are a sleep: a 2.5 MB model on two busy cores made
64-138 tokens/s with two threads and 7,000 with one (measured)."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """How long a sequence may be, how many are computed at once, and how many tokens of them the KV cache holds in all."""

    context: int
    slots: int
    kv_tokens: int


def default_context(shape: ModelShape) -> int:
    """Tokens of a sequence when a deployment names none: the trained context, at most `CONTEXT_MOST`."""
    return max(1, min(CONTEXT_MOST, shape.context_trained))


def precision_for(kind: DeviceKind, name: str, compute_capability: tuple[int, int] | None) -> Precision:
    """The precision that a card is good at; fp32 where nothing is known, for it is right everywhere.

    A CPU's precision is for its probe to say (AMX or AVX512-BF16); this answers fp32.
    """
    if kind is not DeviceKind.CUDA or compute_capability is None:
        return Precision.FP32
    if compute_capability >= BF16_FROM:
        return Precision.BF16
    if compute_capability >= FP16_FROM and not any(board in name for board in NO_TENSOR_CORES):
        return Precision.FP16
    return Precision.FP32


def card_flash_attention(device: DeviceSnapshot) -> bool:
    """Whether the card has a fast flash-attention kernel; a card whose capability could not be read is taken for a current one."""
    if device.kind is not DeviceKind.CUDA:
        return False
    return device.compute_capability is None or device.compute_capability >= FLASH_ATTENTION_FROM


def sequences_for(
    kind: ModelKind, shape: ModelShape, *, context: int | None, slots: int | None, kv_tokens: int | None
) -> Sequences:
    """What a deployment's wishes come to for a model of this shape; None is a default each.

    Without `slots` a chat model has `SLOTS` of them, which share `kv_tokens` (one context); with it every slot has a whole context, unless
    `kv_tokens` says fewer. Raises `ValueError`, worded for the operator, for wishes that contradict each other.
    """
    context = default_context(shape) if context is None else context
    if context < 1 or (slots is not None and slots < 1):
        raise ValueError(f"context and slots must be at least 1, not {context} and {slots}")
    if kind is not ModelKind.CHAT:
        if kv_tokens is not None:
            raise ValueError(f"kv_tokens is for chat models: a model for {kind.value} has no KV cache; leave it out")
        return Sequences(min(context, max(1, shape.context_trained)), slots or 1, 0)
    if kv_tokens is None:
        kv_tokens = context * (1 if slots is None else slots)
    slots = SLOTS if slots is None else slots
    if not context <= kv_tokens <= slots * context:
        raise ValueError(
            f"kv_tokens = {kv_tokens} does not go with a context of {context} and {slots} slots: it must be from {context} (all slots "
            f"share one context) to {slots * context} (every slot has its own)"
        )
    return Sequences(context, slots, kv_tokens)


def settings_for(
    device: DeviceSnapshot,
    entry_kind: ModelKind,
    shape: ModelShape,
    *,
    context: int | None = None,
    slots: int | None = None,
    kv_tokens: int | None = None,
    kv_type: KvType = KvType.F16,
    gpu_layers: int | None = None,
) -> RuntimeSettings:
    """How one replica of `shape` runs on `device`. `context` is tokens of a sequence; `sequences_for` says what the Nones become.

    `gpu_layers` None is all of them; a device without a card has none. Raises `ValueError` for wishes that contradict each other.
    """
    found = sequences_for(entry_kind, shape, context=context, slots=slots, kv_tokens=kv_tokens)
    if gpu_layers is not None and gpu_layers < 0:
        raise ValueError(f"gpu_layers must be at least 0, not {gpu_layers}")
    # A simulated device only declares memory; the work is done by this machine's CPU.
    on_card = device.kind is DeviceKind.CUDA and not device.simulated
    some = on_card and gpu_layers is not None and gpu_layers < all_gpu_layers(shape)
    threads = _threads(device, on_card=on_card and not some)
    if not on_card and entry_kind is ModelKind.CHAT:
        threads = min(threads, max(1, -(-shape.tensor_bytes // BYTES_A_THREAD)))
    if entry_kind is not ModelKind.CHAT:
        return RuntimeSettings(
            context=found.context,
            slots=found.slots,
            gpu_layers=-1 if on_card else 0,
            threads=threads,
            precision=_embedding_precision(device, on_card=on_card),
            batch_tokens=_batch_tokens(device, on_card=on_card),
        )
    # Off on a CPU: 10-25 % faster there (field notes, Engines). A quantised V exists only with it.
    flash_attention = (on_card and card_flash_attention(device)) or kv_type is not KvType.F16
    most = MICRO_BATCH_CUDA if on_card else MICRO_BATCH_CPU
    return RuntimeSettings(
        context=found.context,
        slots=found.slots,
        kv_tokens=found.kv_tokens,
        gpu_layers=gpu_layers if some and gpu_layers is not None else -1 if on_card else 0,
        threads=threads,
        batch=max(BATCH_LEAST, found.slots),
        micro_batch=min(most, max(32, found.kv_tokens)),
        flash_attention=flash_attention,
        kv_type=kv_type,
        # Pages of a mapped file are shared by workers of the same file and need no second copy while loading.
        mmap=True,
        precision=device.precision,
    )


def all_gpu_layers(shape: ModelShape) -> int:
    """How many layers llama.cpp can offload: the model's own and the output layer ("offloaded 33/33 layers to GPU")."""
    return shape.layers + 1


def _threads(device: DeviceSnapshot, *, on_card: bool) -> int:
    # On a card the CPU only launches kernels and samples: more than a few threads spin for nothing.
    physical = device.cpu_threads or 1
    return max(1, min(physical, 4 if on_card else THREADS_MOST))


def _embedding_precision(device: DeviceSnapshot, *, on_card: bool) -> Precision:
    if not on_card:
        # A pretended card's precision says nothing about the CPU below it, and fp32 is right on every one.
        return Precision.FP32 if device.kind is DeviceKind.CUDA else device.precision
    if device.compute_capability is None:
        return Precision.FP32
    known = precision_for(device.kind, device.name, device.compute_capability)
    return Precision.FP32 if Precision.FP32 in (known, device.precision) else known


def _batch_tokens(device: DeviceSnapshot, *, on_card: bool) -> int:
    if not on_card:
        return BATCH_TOKENS_CPU
    return BATCH_TOKENS_SMALL_CARD if device.memory_total < SMALL_CARD_BYTES else BATCH_TOKENS_CUDA
