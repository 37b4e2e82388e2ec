"""Tensors without their data: names, dimensions, types and the bytes that follow from them.

Law of this file: arithmetic on ggml's block sizes. It knows neither the file format (`core.gguf`) nor an architecture (`core.tensor_plan`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tars.core.types import Bytes

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""ggml type number -> name, elements per block, bytes per block (ggml.c, `type_traits`)."""
BLOCKS = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}
"""Type name -> elements per block, bytes per block."""

INPUT_TENSORS = frozenset({"position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"})
"""Tables that llama.cpp keeps on the host whatever is offloaded, beside `token_embd.weight` (llama-arch.cpp, LLM_TENSOR_LAYER_INPUT)."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of a tensor list. `dimensions[0]` is the row length; `offset` counts from the start of a file's data section."""

    name: str
    dimensions: tuple[int, ...]
    type: str
    nbytes: Bytes
    """Block-padded bytes, without the padding to a file's alignment."""
    offset: int = 0


def tensor_nbytes(dimensions: tuple[int, ...], type_name: str) -> Bytes:
    """Block-padded bytes of a tensor. Raises `ValueError` when its rows are no whole number of blocks, which ggml refuses."""
    elements, size = BLOCKS[type_name]
    if not dimensions or dimensions[0] % elements:
        raise ValueError(f"rows of {type_name} must be a multiple of {elements} elements long, not {dimensions[:1]}")
    return Bytes(math.prod(dimensions) // elements * size)


def tensor_bytes(tensors: Iterable[Tensor]) -> Bytes:
    """Bytes of all of them."""
    return Bytes(sum(tensor.nbytes for tensor in tensors))


def host_bytes(tensors: Iterable[Tensor]) -> Bytes:
    """What stays on the host when every layer is offloaded.

    That is `token_embd`, unless it is also the output (no `output.weight`): then llama.cpp puts a second copy of it on the card.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    staying = set(INPUT_TENSORS)
    if "output.weight" in by_name:
        staying.add("token_embd.weight")
    return tensor_bytes(by_name[name] for name in sorted(staying & by_name.keys()))


def layer_bytes(tensors: Iterable[Tensor], layers: int) -> tuple[int, ...]:
    """What each layer's tensors (`blk.<number>.`) take, [layers]."""
    found = [0] * layers
    for tensor in tensors:
        block, _, rest = tensor.name.partition(".")
        number = rest.partition(".")[0]
        # Nine digits are more than any count that a header may claim, and never too many for `int`.
        if block == "blk" and number.isdecimal() and len(number) <= 9 and int(number) < layers:
            found[int(number)] += tensor.nbytes
    return tuple(found)
