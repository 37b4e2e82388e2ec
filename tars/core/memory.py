"""How many bytes a replica takes on its device, from counts alone.

Law of this file: pure arithmetic over `ModelShape`; every formula names where it comes from. Weights are never guessed from a
file's name: `ModelShape.tensor_bytes` is the sum over the header's tensors (`core.gguf`) or over the list that `core.tensor_plan` rebuilds.
A load that was measured replaces the sum (`MemoryEstimate.measured`); that is the planner's business, not this file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tars.core.tuning import all_gpu_layers, settings_for
from tars.core.types import (
    Adapter,
    Bytes,
    DeviceKind,
    DeviceSnapshot,
    KvType,
    MemoryEstimate,
    ModelKind,
    ModelShape,
    Precision,
    RuntimeSettings,
)

CUDA_CONTEXT = Bytes.mib(450)
"""What a process holds on a card before any tensor: 450 MiB on a 4090, 107 on a 4060 Ti; 450 until measured (field notes)."""
LLAMA_PROCESS = Bytes.mib(80)
"""Resident memory of a worker with llama.cpp loaded and no model: 58 MiB measured (x86-64, llama-cpp-python 0.3.36), and room for
what grows with use: token tables, batches, allocator slack."""
TORCH_PROCESS = Bytes.mib(470)
"""The same with torch (CPU build) and sentence-transformers imported: 444 MiB measured, of which the worker's own 16 are not."""
TORCH_CUDA_WORKSPACE = Bytes.mib(64)
"""On top of the CUDA context: cuBLAS's workspaces and what torch's caching allocator rounds up to (blocks of 2 and 20 MiB)."""
DRAFTED_MOST = 2
"""Answers that a draft model proposes for at once; where more run, they fill the device without. Each has a sequence of its context."""
DRAFT_BATCH = 128
"""Tokens that a draft model computes at most before a step, so that a long prompt does not hold up the answer it is for."""
KV_PADDING = 256
"""llama.cpp pads the cells of a stream to a multiple of this (`llama_context`: `GGML_PAD(n_ctx_seq, 256)`)."""
KV_BYTES: dict[KvType, tuple[int, int]] = {KvType.F16: (2, 1), KvType.Q8_0: (34, 32), KvType.Q4_0: (18, 32)}
"""Bytes per so many elements."""


def padded_context(context: int) -> int:
    """Cells of one KV stream for `context` tokens."""
    return -(-context // KV_PADDING) * KV_PADDING


@dataclass(frozen=True, slots=True)
class _Cells:
    """The KV cache as llama.cpp makes it: `streams` of so many cells each. One stream that all sequences share is its unified cache."""

    stream: int
    streams: int

    @property
    def total(self) -> int:
        return self.stream * self.streams


def _cells(context: int, slots: int, kv_tokens: int | None) -> _Cells:
    if kv_tokens is not None and kv_tokens < slots * context:
        return _Cells(padded_context(kv_tokens), 1)
    return _Cells(padded_context(context), slots)


def kv_bytes_per_token(shape: ModelShape, kv_type: KvType = KvType.F16) -> Bytes:
    """layers x kv_heads x (k_dim + v_dim) x bytes of the type (field notes, Memory of a GGUF model). No discount for sliding windows."""
    size, elements = KV_BYTES[kv_type]
    count = shape.layers * shape.kv_heads * (shape.key_length + shape.value_length)
    return Bytes(-(-count * size // elements))


def kv_cache_bytes(
    shape: ModelShape, *, context: int, slots: int, kv_tokens: int | None = None, kv_type: KvType = KvType.F16
) -> Bytes:
    """One stream per slot, each with `context` tokens padded to `KV_PADDING` cells; or one of `kv_tokens` where those are fewer."""
    return Bytes(kv_bytes_per_token(shape, kv_type) * _cells(context, slots, kv_tokens).total)


def compute_bytes_cuda(
    shape: ModelShape,
    *,
    context: int,
    slots: int,
    micro_batch: int,
    flash_attention: bool,
    kv_tokens: int | None = None,
) -> Bytes:
    """Compute buffer on a card (field notes, Memory of a GGUF model; the head term is confirmed by a real log of Llama-3-8B).

    max(4*ub*(1 + 4*embd + ctx*(1 + heads)), 4*ub*(embd + vocab)); with flash attention the second plus a mask of 2*ub*ctx. ctx is what
    one stream holds: all of the cache where slots share it.
    """
    kv = _cells(context, slots, kv_tokens)
    batch, cells = min(micro_batch, kv.total), kv.stream
    head = 4 * batch * (shape.embedding + shape.vocabulary)
    if flash_attention:
        return Bytes(head + 2 * batch * cells)
    return Bytes(max(head, 4 * batch * (1 + 4 * shape.embedding + cells * (1 + shape.heads))))


def compute_bytes_cpu(
    shape: ModelShape,
    *,
    context: int,
    slots: int,
    micro_batch: int,
    flash_attention: bool,
    kv_tokens: int | None = None,
) -> Bytes:
    """Compute and output buffers on the CPU back end (field notes, Memory on the CPU back end; measured error 0 to 2 %).

    max(head, layer, attention) + output, with U = min(ubatch, ctx) and S = padded cells of a stream: all of the cache where slots share it.
    """
    kv = _cells(context, slots, kv_tokens)
    batch, cells = min(micro_batch, kv.total), kv.stream
    embedding, vocabulary = shape.embedding, shape.vocabulary
    head = 4 * batch * (vocabulary + 2 * embedding)
    mask = 2 if flash_attention else 4
    layer = mask * batch * cells + 4 * batch * (4 * embedding + 3 * shape.feed_forward)
    attention = 0
    if not flash_attention:
        # 2*kv_heads*head_dim: K and V of the new tokens.
        new_kv = shape.kv_heads * (shape.key_length + shape.value_length)
        attention = 4 * batch * cells * (shape.heads + 1) + 4 * batch * (5 * embedding + new_kv)
    output = 4 * vocabulary * slots
    return Bytes(max(head, layer, attention) + output)


def estimate(
    shape: ModelShape,
    *,
    context: int,
    slots: int = 1,
    kv_tokens: int | None = None,
    kv_type: KvType = KvType.F16,
    micro_batch: int = 512,
    flash_attention: bool = True,
    device_kind: DeviceKind = DeviceKind.CUDA,
    gpu_layers: int = -1,
    overhead: Bytes | None = None,
) -> MemoryEstimate:
    """Bytes of one replica of a GGUF model on its device.

    `context` is tokens of a sequence, `kv_tokens` those of all slots together (None: context x slots). `gpu_layers` -1 is all; of fewer
    the output layer is the first, then the model's last layers (llama-model.cpp, `i_gpu_start`).

    `overhead` None is `CUDA_CONTEXT` or `LLAMA_PROCESS`. On a CPU weights count once: where llama.cpp
    rearranges them, the worker lets go of the file's pages.

    Raises `ValueError` for counts below 1 and for a quantised KV cache without flash attention, which llama.cpp refuses.
    """
    if context < 1 or slots < 1 or micro_batch < 1:
        raise ValueError(f"context, slots and micro_batch must be at least 1, not {context}, {slots} and {micro_batch}")
    if kv_type is not KvType.F16 and not flash_attention:
        raise ValueError(f"a {kv_type} KV cache needs flash attention")
    kv_cache = kv_cache_bytes(shape, context=context, slots=slots, kv_tokens=kv_tokens, kv_type=kv_type)
    if device_kind is DeviceKind.CPU:
        return MemoryEstimate(
            weights=shape.tensor_bytes,
            kv_cache=kv_cache,
            compute=compute_bytes_cpu(
                shape,
                context=context,
                slots=slots,
                kv_tokens=kv_tokens,
                micro_batch=micro_batch,
                flash_attention=flash_attention,
            ),
            overhead=LLAMA_PROCESS if overhead is None else overhead,
        )
    weights = Bytes(shape.tensor_bytes - shape.host_bytes)
    if 0 <= gpu_layers <= shape.layers:
        weights = _offloaded(shape, gpu_layers)
        kv_cache = Bytes(-(-kv_cache * max(0, gpu_layers - 1) // shape.layers))
    return MemoryEstimate(
        weights=weights,
        kv_cache=kv_cache,
        compute=compute_bytes_cuda(
            shape,
            context=context,
            slots=slots,
            kv_tokens=kv_tokens,
            micro_batch=micro_batch,
            flash_attention=flash_attention,
        ),
        overhead=CUDA_CONTEXT if overhead is None else overhead,
    )


def _offloaded(shape: ModelShape, gpu_layers: int) -> Bytes:
    """Weights of so many layers, fewer than all of them, on the card."""
    every = shape.tensor_bytes - shape.host_bytes
    if len(shape.layer_bytes) != shape.layers:
        return Bytes(-(-every * gpu_layers // all_gpu_layers(shape)))
    if gpu_layers == 0:
        return Bytes(0)
    return Bytes(every - sum(shape.layer_bytes[: shape.layers + 1 - gpu_layers]))


def estimate_encoder(
    shape: ModelShape,
    *,
    context: int,
    batch_tokens: int,
    precision: Precision = Precision.FP32,
    device_kind: DeviceKind = DeviceKind.CUDA,
    overhead: Bytes | None = None,
) -> MemoryEstimate:
    """Bytes of one replica of an embedding or rerank model, run by torch.

    `shape.tensor_bytes` is its fp32 size; half precision halves it. Activations of one forward pass over T = max(batch_tokens, context)
    tokens: six rows of the embedding (input, Q, K, V, attention's output, residual), two of the feed-forward (before and after its
    activation), and the mask, T x context in fp32; scaled-dot-product attention keeps no score matrix.
    """
    if context < 1 or batch_tokens < 1:
        raise ValueError(f"context and batch_tokens must be at least 1, not {context} and {batch_tokens}")
    size = 4 if precision is Precision.FP32 else 2
    tokens = max(batch_tokens, context)
    activations = tokens * (6 * shape.embedding + 2 * shape.feed_forward) * size + 4 * tokens * context
    if overhead is None:
        on_card = device_kind is DeviceKind.CUDA
        overhead = Bytes(CUDA_CONTEXT + TORCH_CUDA_WORKSPACE) if on_card else TORCH_PROCESS
    return MemoryEstimate(
        weights=Bytes(shape.tensor_bytes * size // 4),
        kv_cache=Bytes(0),
        compute=Bytes(activations),
        overhead=overhead,
    )


def estimate_replica(
    device: DeviceSnapshot,
    kind: ModelKind,
    shape: ModelShape,
    settings: RuntimeSettings,
    *,
    gpu_layers: int | None = None,
    adapters: Sequence[Adapter] = (),
    draft: ModelShape | None = None,
) -> MemoryEstimate:
    """What the planner counts for one replica with these settings on this device.

    A simulated card is counted as the card that it stands for, with that card's settings, although the CPU computes: so a plan of a fleet
    that is not there is the plan that the real cards would get: `gpu_layers` is what was asked for there. Where the card shares the host's
    RAM, what "stays on the host" counts too. Adapters count the bytes of their files; a draft model runs whole beside the model, with a
    KV cache of its own for `DRAFTED_MOST` sequences and decodes of `DRAFT_BATCH` tokens.
    """
    if device.simulated and device.kind is DeviceKind.CUDA:
        device = replace(device, simulated=False)
        settings = settings_for(
            device,
            kind,
            shape,
            context=settings.context,
            slots=settings.slots,
            kv_tokens=settings.kv_tokens or None,
            kv_type=settings.kv_type,
            gpu_layers=gpu_layers,
        )
    if kind is not ModelKind.CHAT:
        return estimate_encoder(
            shape,
            context=settings.context,
            batch_tokens=settings.batch_tokens,
            precision=settings.precision,
            device_kind=device.kind,
        )
    found = _estimate_llama(device, shape, settings)
    if draft is not None:
        few = min(settings.slots, DRAFTED_MOST)
        beside = _estimate_llama(device, draft, replace(settings, gpu_layers=-1, slots=few, micro_batch=DRAFT_BATCH))
        found = replace(
            found,
            weights=Bytes(found.weights + beside.weights),
            kv_cache=Bytes(found.kv_cache + beside.kv_cache),
            compute=Bytes(found.compute + beside.compute),
        )
    if not adapters:
        return found
    return replace(found, weights=Bytes(found.weights + sum(adapter.file_bytes for adapter in adapters)))


def _estimate_llama(device: DeviceSnapshot, shape: ModelShape, settings: RuntimeSettings) -> MemoryEstimate:
    gpu_layers = settings.gpu_layers
    if device.unified_memory:
        # What is not offloaded lies in the same RAM.
        shape, gpu_layers = replace(shape, host_bytes=Bytes(0)), -1
    return estimate(
        shape,
        context=settings.context,
        slots=settings.slots,
        kv_tokens=settings.kv_tokens,
        kv_type=settings.kv_type,
        micro_batch=settings.micro_batch,
        flash_attention=settings.flash_attention,
        device_kind=device.kind,
        gpu_layers=gpu_layers,
    )
