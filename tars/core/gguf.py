"""The header of a GGUF file: metadata, tensor list and the counts that decide its memory.

Law of this file: bytes in, values out; no file is opened here and no tensor data is read. How the bytes are read without trust is
`gguf_reader`'s.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tars.core.gguf_reader import GgufArray, GgufError, GgufReader, damaged, shown
from tars.core.tensors import TENSOR_TYPES, Tensor, host_bytes, layer_bytes, tensor_bytes, tensor_nbytes
from tars.core.types import Bytes, ModelShape

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_METADATA_KEYS = 65_536
"""Real files have 20 to 60; a Mixtral with one table per expert has a few hundred."""
MOST_TENSORS = 65_536
"""Llama-3.1-405B has about 1,140; DeepSeek-V3, with 61 layers of stacked experts, about 1,000."""
MOST_DIMENSIONS = 4
"""ggml's GGML_MAX_DIMS."""

FILE_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    25: "IQ4_NL",
    30: "IQ4_XS",
    32: "BF16",
    38: "MXFP4",
}
"""`general.file_type` -> the quantisation's name (llama.h, `llama_ftype`); others are named by their commonest tensor type."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A parsed header. `data_offset` is where tensor data starts, from the start of the file."""

    version: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    alignment: int
    data_offset: int
    file_bytes: Bytes

    @property
    def architecture(self) -> str:
        """`llama`, `phi3`, `bert`...; empty when the file does not say."""
        return self._text("general.architecture")

    @property
    def name(self) -> str:
        """The model's own name, for people; may be empty."""
        return self._text("general.name")

    @property
    def licence(self) -> str:
        """SPDX-like name; may be empty."""
        return self._text("general.license")

    @property
    def chat_template(self) -> str | None:
        """Jinja source, None when the file carries none."""
        return self._text("tokenizer.chat_template") or None

    @property
    def tokenizer_model(self) -> str | None:
        """`llama` (SentencePiece), `gpt2` (byte pairs), `bert`...; None when the file carries no tokenizer."""
        return self._text("tokenizer.ggml.model") or None

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained on; 0 when the file does not say."""
        return self._count("context_length", default=0)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the output: the embedding table's where there is one, else the tokenizer's count."""
        table = next((tensor for tensor in self.tensors if tensor.name == "token_embd.weight"), None)
        if table is not None and len(table.dimensions) == 2:
            return table.dimensions[1]
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.count if isinstance(tokens, GgufArray) else self._count("vocab_size", default=0)

    @property
    def quantisation(self) -> str:
        """`Q4_K_M`, `F16`...: the file's declared type, else the type that holds most bytes."""
        declared = self.metadata.get("general.file_type")
        if isinstance(declared, int) and declared in FILE_TYPES:
            return FILE_TYPES[declared]
        held: dict[str, int] = {}
        for tensor in self.tensors:
            held[tensor.type] = held.get(tensor.type, 0) + tensor.nbytes
        return max(held, key=lambda name: (held[name], name), default="F32")

    def shape(self) -> ModelShape:
        """The counts that decide its memory. Raises `GgufError` when the header misses one, or holds an impossible one."""
        if not self.architecture:
            raise GgufError(
                "The file names no architecture (general.architecture): it holds no model. Use a converted model file."
            )
        layers = self._required("block_count")
        embedding = self._required("embedding_length")
        heads = self._count("attention.head_count", default=0)
        kv_heads = self._count("attention.head_count_kv", default=heads)
        head_length = embedding // heads if heads else 0
        return ModelShape(
            architecture=self.architecture,
            layers=layers,
            embedding=embedding,
            heads=heads,
            kv_heads=kv_heads,
            # 4 x embedding is the transformer's usual width where a file does not say.
            feed_forward=self._count("feed_forward_length", default=4 * embedding),
            vocabulary=self.vocabulary_size,
            key_length=self._count("attention.key_length", default=head_length),
            value_length=self._count("attention.value_length", default=head_length),
            context_trained=self._required("context_length"),
            tensor_bytes=tensor_bytes(self.tensors),
            host_bytes=host_bytes(self.tensors),
            file_bytes=self.file_bytes,
            experts=self._count("expert_count", default=0),
            layer_bytes=layer_bytes(self.tensors, min(layers, MOST_TENSORS)),
        )

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def _required(self, key: str) -> int:
        value = self._count(key, default=0)
        if value < 1:
            raise GgufError(
                f"The header has no usable {self.architecture}.{key}: this is not a language model that TARS can serve, or "
                "its conversion failed. Download or convert it again."
            )
        return value

    def _count(self, key: str, *, default: int) -> int:
        """A count of this architecture; of a list with one number per layer the mean, rounded up (what a sum over layers needs)."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple) and value and all(type(number) is int for number in value):
            value = -(-sum(value) // len(value))
        if value is None:
            return default
        if type(value) is not int or not 0 <= value < 2**31:
            raise GgufError(
                f"The header's {self.architecture}.{key} is not a count: the file is damaged. Download or convert it again."
            )
        return value


def parse_gguf(buffer: memoryview | bytes, file_bytes: int) -> GgufHeader:
    """The header at the start of `buffer` (the whole file mapped, or a prefix that holds the header) of a file of `file_bytes`.

    Raises `GgufError` and nothing else: not a GGUF file, big-endian, version 1, split, truncated in the header or in the data (with the
    bytes that are missing), counts that cannot be.
    """
    reader = GgufReader(
        memoryview(buffer).cast("B") if not isinstance(buffer, bytes) else memoryview(buffer), file_bytes
    )
    version = _preamble(reader)
    tensor_count = reader.uint64()
    key_count = reader.uint64()
    # The least a row of each list takes: 8 + 4 + 8 + 4 + 8 bytes, and 8 + 4 + 1.
    reader.check_count("tensors", tensor_count, most=MOST_TENSORS, least_bytes=32)
    reader.check_count("metadata keys", key_count, most=MOST_METADATA_KEYS, least_bytes=13)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.name("metadata key")
        if key in metadata:
            raise damaged(f"the metadata key {shown(key)} stands there twice")
        metadata[key] = reader.value(reader.uint32())
    _refuse_split(metadata)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise damaged("its alignment is no power of two up to 1 MiB")
    tensors = _tensors(reader, tensor_count, alignment)
    data_offset = _aligned(reader.at, alignment)
    if tensors:
        end = data_offset + tensors[-1].offset + tensors[-1].nbytes
        if end > file_bytes:
            raise GgufError(
                f"The file is truncated: {end - file_bytes:,} bytes of its tensors are missing ({file_bytes:,} of at least {end:,} "
                "are there). Download it again."
            )
    return GgufHeader(
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        data_offset=data_offset,
        file_bytes=Bytes(file_bytes),
    )


def _preamble(reader: GgufReader) -> int:
    if reader.left == 0:
        raise GgufError("The file is empty. Download it again.")
    magic = reader.take(min(4, reader.left))
    if magic != MAGIC:
        raise GgufError(
            "This is not a GGUF file (it does not start with 'GGUF'). Use a .gguf file; other formats must be converted first."
        )
    version = reader.uint32()
    if version & 0xFFFF == 0:
        raise GgufError(
            "This GGUF file is big-endian. Use the little-endian one, or convert it with gguf_convert_endian."
        )
    if version not in VERSIONS:
        raise GgufError(
            f"This GGUF file has format version {version}; TARS reads {VERSIONS[0]} and {VERSIONS[1]}. Convert the model again."
        )
    return version


def _refuse_split(metadata: dict[str, Any]) -> None:
    count = metadata.get("split.count", 0)
    if type(count) is int and count > 1:
        number = metadata.get("split.no", 0)
        part = f"part {number + 1} of {count}" if type(number) is int else f"one of {count} parts"
        raise GgufError(
            f"This file is {part} of a split model, which TARS does not serve. Merge the parts into one file with "
            "`llama-gguf-split --merge` and use that."
        )


def _tensors(reader: GgufReader, count: int, alignment: int) -> tuple[Tensor, ...]:
    found: dict[str, Tensor] = {}
    expected = 0
    for _ in range(count):
        name = reader.name("tensor name")
        rank = reader.uint32()
        if not 1 <= rank <= MOST_DIMENSIONS:
            raise damaged(f"the tensor {shown(name)} has {rank} dimensions")
        dimensions = tuple(reader.uint64() for _ in range(rank))
        type_number = reader.uint32()
        offset = reader.uint64()
        if type_number not in TENSOR_TYPES:
            raise GgufError(
                f"The tensor {shown(name)} has a type that TARS does not know (number {type_number}): the file is damaged or "
                "newer than this TARS. Download it again, or use another quantisation."
            )
        if min(dimensions) < 1 or math.prod(dimensions) >= 2**62:
            raise damaged(f"the tensor {shown(name)} has impossible dimensions")
        if name in found:
            raise damaged(f"the tensor {shown(name)} stands there twice")
        type_name = TENSOR_TYPES[type_number][0]
        try:
            nbytes = tensor_nbytes(dimensions, type_name)
        except ValueError as wrong:
            raise damaged(f"the tensor {shown(name)} cannot be: {wrong}") from None
        # llama.cpp refuses holes and overlaps as well (gguf.cpp): each tensor starts where the one before it ends.
        if offset != expected:
            raise damaged(f"the data of tensor {shown(name)} do not start where the tensor before it ends")
        found[name] = Tensor(name, dimensions, type_name, nbytes, offset)
        expected = _aligned(expected + nbytes, alignment)
    return tuple(found.values())


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
