"""The tensor list that a known architecture has at a known quantisation, rebuilt from counts, so that a file can be planned for
before it is downloaded.

Law of this file: rules of llama.cpp's converter (which tensors exist) and quantiser (which type each gets; llama-quant.cpp,
`llama_tensor_get_type`), nothing else. A file that is here is never planned by these rules but by its own header (`core.gguf`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tars.core.tensors import BLOCKS, Tensor, host_bytes, layer_bytes, tensor_bytes, tensor_nbytes
from tars.core.types import Bytes, ModelShape

QUANTISATIONS = ("F16", "Q8_0", "Q4_K_M")
"""What `tensor_plan` knows the rules of."""
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types for rows that are no multiple of 256 elements (field notes, Memory of a GGUF model)."""
HEADER_BYTES_PER_TOKEN = 40
"""Metadata are mostly the vocabulary: 23 bytes a token with SentencePiece (text, score, type), 39 to 61 with byte pairs and merges."""
SEVENTY_B_LAYERS = 80
"""llama.cpp takes a llama model with so many layers for the 70B, whose shared attn_v is small and gets at least Q5_K."""


@dataclass(frozen=True, slots=True)
class Counts:
    """One row of a shape table: what an architecture's tensor list follows from.

    `architecture` is llama.cpp's name: `llama` (Mistral and DeepSeek-Coder too), `qwen2`, `phi2`, `phi3`, `stablelm`.
    `tied`: the output shares the embedding table, so that the file has no `output.weight`. `rope_factors`: the length of the
    `rope_freqs` table that Llama 3.1 and later carry, 0 for none.
    """

    architecture: str
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context_trained: int
    head_length: int | None = None
    """None: embedding / heads."""
    tied: bool = False
    rope_factors: int = 0

    @property
    def key_length(self) -> int:
        """Elements of one head's K, and of its V."""
        return self.head_length if self.head_length is not None else self.embedding // self.heads


def tensor_plan(counts: Counts, quantisation: str) -> tuple[Tensor, ...]:
    """The tensors of a model of these counts. Raises `ValueError` for an architecture or a quantisation whose rules are not known."""
    if counts.architecture not in _LAYERS:
        raise ValueError(f"the tensor list of {counts.architecture!r} is not known; known are {sorted(_LAYERS)}")
    if quantisation not in QUANTISATIONS:
        raise ValueError(f"the rules of {quantisation!r} are not known; known are {list(QUANTISATIONS)}")
    return tuple(
        Tensor(name, dimensions, kind, tensor_nbytes(dimensions, kind))
        for name, dimensions in _tensors(counts)
        for kind in (_type_of(name, dimensions, counts, quantisation),)
    )


def planned_shape(counts: Counts, quantisation: str, *, file_bytes: int | None = None) -> ModelShape:
    """The shape that the header of such a file would give; `file_bytes` where the real file's size is known, else computed."""
    tensors = tensor_plan(counts, quantisation)
    held = tensor_bytes(tensors)
    return ModelShape(
        architecture=counts.architecture,
        layers=counts.layers,
        embedding=counts.embedding,
        heads=counts.heads,
        kv_heads=counts.kv_heads,
        feed_forward=counts.feed_forward,
        vocabulary=counts.vocabulary,
        key_length=counts.key_length,
        value_length=counts.key_length,
        context_trained=counts.context_trained,
        tensor_bytes=held,
        host_bytes=host_bytes(tensors),
        layer_bytes=layer_bytes(tensors, counts.layers),
        file_bytes=Bytes(held + HEADER_BYTES_PER_TOKEN * counts.vocabulary if file_bytes is None else file_bytes),
    )


def use_more_bits(layer: int, layers: int) -> bool:
    """The layers whose `attn_v` and `ffn_down` a Q4_K_M file keeps in Q6_K: the first and last eighth and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


_Dimensions = tuple[int, ...]
_Named = tuple[str, _Dimensions]


def _tensors(counts: Counts) -> Iterator[_Named]:
    embedding, vocabulary = counts.embedding, counts.vocabulary
    yield "token_embd.weight", (embedding, vocabulary)
    layer_tensors = _LAYERS[counts.architecture]
    for layer in range(counts.layers):
        for name, dimensions in layer_tensors(counts):
            yield f"blk.{layer}.{name}", dimensions
    yield "output_norm.weight", (embedding,)
    if counts.architecture in _NORM_BIAS:
        yield "output_norm.bias", (embedding,)
    if not counts.tied:
        yield "output.weight", (embedding, vocabulary)
    if counts.architecture == "phi2":
        yield "output.bias", (vocabulary,)
    if counts.rope_factors:
        yield "rope_freqs.weight", (counts.rope_factors,)


def _llama_layer(counts: Counts) -> Iterator[_Named]:
    embedding, feed_forward = counts.embedding, counts.feed_forward
    query = counts.heads * counts.key_length
    key = counts.kv_heads * counts.key_length
    yield "attn_norm.weight", (embedding,)
    yield "attn_q.weight", (embedding, query)
    yield "attn_k.weight", (embedding, key)
    yield "attn_v.weight", (embedding, key)
    yield "attn_output.weight", (query, embedding)
    yield "ffn_norm.weight", (embedding,)
    yield "ffn_gate.weight", (embedding, feed_forward)
    yield "ffn_up.weight", (embedding, feed_forward)
    yield "ffn_down.weight", (feed_forward, embedding)


def _qwen2_layer(counts: Counts) -> Iterator[_Named]:
    yield from _llama_layer(counts)
    yield "attn_q.bias", (counts.heads * counts.key_length,)
    yield "attn_k.bias", (counts.kv_heads * counts.key_length,)
    yield "attn_v.bias", (counts.kv_heads * counts.key_length,)


def _stablelm_layer(counts: Counts) -> Iterator[_Named]:
    yield from _llama_layer(counts)
    yield "attn_norm.bias", (counts.embedding,)
    yield "ffn_norm.bias", (counts.embedding,)


def _phi2_layer(counts: Counts) -> Iterator[_Named]:
    # Attention and feed-forward run side by side behind one norm; no gate.
    embedding, feed_forward = counts.embedding, counts.feed_forward
    for name, dimensions in (
        ("attn_qkv", (embedding, 3 * embedding)),
        ("attn_output", (embedding, embedding)),
        ("ffn_up", (embedding, feed_forward)),
        ("ffn_down", (feed_forward, embedding)),
    ):
        yield f"{name}.weight", dimensions
        yield f"{name}.bias", (dimensions[1],)
    yield "attn_norm.weight", (embedding,)
    yield "attn_norm.bias", (embedding,)


def _phi3_layer(counts: Counts) -> Iterator[_Named]:
    # Q, K and V in one tensor; gate and up in another.
    embedding, feed_forward = counts.embedding, counts.feed_forward
    query = counts.heads * counts.key_length
    yield "attn_norm.weight", (embedding,)
    yield "attn_qkv.weight", (embedding, query + 2 * counts.kv_heads * counts.key_length)
    yield "attn_output.weight", (query, embedding)
    yield "ffn_norm.weight", (embedding,)
    yield "ffn_up.weight", (embedding, 2 * feed_forward)
    yield "ffn_down.weight", (feed_forward, embedding)


_LAYERS = {
    "llama": _llama_layer,
    "qwen2": _qwen2_layer,
    "stablelm": _stablelm_layer,
    "phi2": _phi2_layer,
    "phi3": _phi3_layer,
}
_NORM_BIAS = frozenset({"phi2", "stablelm"})


def _type_of(name: str, dimensions: _Dimensions, counts: Counts, quantisation: str) -> str:
    if len(dimensions) == 1:
        # Norms, biases and rope tables are small and stay exact.
        return "F32"
    if quantisation != "Q4_K_M":
        return quantisation
    kind = _q4_k_m(name, counts)
    elements, _ = BLOCKS[kind]
    return FALLBACK[kind] if dimensions[0] % elements else kind


def _q4_k_m(name: str, counts: Counts) -> str:
    if name == "output.weight" or (counts.tied and name == "token_embd.weight"):
        return "Q6_K"
    if not name.startswith("blk."):
        return "Q4_K"
    _, layer, part, _ = name.split(".")
    if part in ("attn_v", "ffn_down") and use_more_bits(int(layer), counts.layers):
        return "Q6_K"
    if part == "attn_v" and counts.architecture == "llama" and counts.layers == SEVENTY_B_LAYERS:
        return "Q5_K"
    if part == "attn_qkv":
        return "Q5_K"
    return "Q4_K"
