"""A llama-architecture GGUF of random weights, 0.3 MB, made in a moment: everything that a real file has except sense.

Its vocabulary holds every byte, so that each text and each grammar can be written in it; its template is ChatML's. The `tiny_gguf`
fixture (tests/conftest.py) makes one file a session. `write_tiny_gguf` takes changes for the odd ones (another template, none,
other shapes).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = "▁ ▁a ▁the ▁is ▁to ▁and in er on at en re th he ing ed user assistant system hello world token stop true false null name age"
"""Each piece is reached only where its parts are tokens too: SentencePiece merges pairs."""

CONTEXT_TRAINED = 2048


def vocabulary(words: str = WORDS) -> list[tuple[str, float, gguf.TokenType]]:
    """(piece, score, type): <unk> <s> </s> <|im_start|> <|im_end|>, 256 bytes, printable ASCII, some words."""
    rows = [
        ("<unk>", 0.0, gguf.TokenType.UNKNOWN),
        ("<s>", 0.0, gguf.TokenType.CONTROL),
        ("</s>", 0.0, gguf.TokenType.CONTROL),
        ("<|im_start|>", 0.0, gguf.TokenType.CONTROL),
        ("<|im_end|>", 0.0, gguf.TokenType.CONTROL),
    ]
    rows += [(f"<0x{byte:02X}>", 0.0, gguf.TokenType.BYTE) for byte in range(256)]
    characters = [chr(code) for code in range(33, 127)] + ["é", "ü", "€", "日", "🙂"]
    pieces = list(dict.fromkeys([*words.split(" "), *characters]))
    rows += [(piece, -float(index), gguf.TokenType.NORMAL) for index, piece in enumerate(pieces)]
    return rows


def write_tiny_gguf(
    path: Path,
    *,
    template: str | None = CHATML,
    architecture: str = "llama",
    add_bos: bool = True,
    seed: int = 1,
    layers: int = 2,
    embedding: int = 64,
    feed_forward: int = 128,
    words: str = WORDS,
) -> Path:
    """Write the file and return its path. Q8_0 matrices (so `embedding` and `feed_forward` are multiples of 32), f32 norms."""
    heads, kv_heads = 4, 2
    tokens = vocabulary(words)
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny random llama")
    writer.add_context_length(CONTEXT_TRAINED)
    writer.add_embedding_length(embedding)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(embedding // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_add_bos_token(add_bos)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        values = (random.standard_normal((rows, columns)) * scale / np.sqrt(columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(embedding, dtype=np.float32))

    matrix("token_embd", len(tokens), embedding, scale=8.0)
    kv_width = embedding // heads * kv_heads
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        matrix(f"{block}.attn_q", embedding, embedding)
        matrix(f"{block}.attn_k", kv_width, embedding)
        matrix(f"{block}.attn_v", kv_width, embedding)
        matrix(f"{block}.attn_output", embedding, embedding)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_gate", feed_forward, embedding)
        matrix(f"{block}.ffn_up", feed_forward, embedding)
        matrix(f"{block}.ffn_down", embedding, feed_forward)
    norm("output_norm")
    matrix("output", len(tokens), embedding, scale=2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_adapter(
    path: Path,
    *,
    architecture: str = "llama",
    kind: str = "adapter",
    method: str = "lora",
    tensor: str | None = "blk.0.attn_q.weight",
    embedding: int = 64,
    output: int | None = None,
    halves: tuple[str, ...] = ("lora_a", "lora_b"),
    seed: int = 1,
    strength: float = 1.0,
    precision: type[np.float16 | np.float32] = np.float32,
) -> Path:
    """Write a LoRA adapter of rank 4 for one tensor (`embedding` to `output`, or to as many) of `write_tiny_gguf`'s model; its path."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", method)
    writer.add_float32("adapter.lora.alpha", 4.0)
    if tensor is not None:
        shapes = {"lora_a": (4, embedding), "lora_b": (output or embedding, 4)}
        for half in halves:
            values = random.standard_normal(shapes[half]) * strength
            writer.add_tensor(f"{tensor}.{half}", values.astype(precision))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
