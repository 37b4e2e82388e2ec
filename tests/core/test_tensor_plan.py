"""tars/core/tensor_plan.py: every row of the reference table of real files comes out of its counts alone.

The table: real files' sizes, and the bytes of their tensors on a card with every layer offloaded, read from their headers.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tars.core.memory import kv_bytes_per_token
from tars.core.tensor_plan import Counts, planned_shape, tensor_plan, use_more_bits


@dataclass(frozen=True)
class Row:
    name: str
    counts: Counts
    quantisation: str
    file_bytes: float | None
    card_mib: float | None
    kv_kib: float


def _row(name, architecture, sizes, context, quantisation, file_bytes, card_mib, kv_kib, rope_factors=0):
    layers, embedding, heads, kv_heads, feed_forward, vocabulary = map(int, sizes.split("/"))
    counts = Counts(
        architecture,
        layers,
        embedding,
        heads,
        kv_heads,
        feed_forward,
        vocabulary,
        context,
        rope_factors=rope_factors,
    )
    return Row(name, counts, quantisation, file_bytes, card_mib, kv_kib)


MISTRAL = "32/4096/32/8/14336/32000"
LLAMA_3_8B = "32/4096/32/8/14336/128256"
PHI_3 = "32/3072/32/32/8192/32064"
TABLE = [
    _row("Mistral-7B-Instruct-v0.2", "llama", MISTRAL, 32768, "Q4_K_M", 4_368_439_584, 4095.05, 128),
    _row("Llama-2-7B-Chat", "llama", "32/4096/32/32/11008/32000", 4096, "Q4_K_M", 4_081_004_224, 3820.93, 512),
    _row("neural-chat-7B-v3-1", "llama", MISTRAL, 32768, "Q4_K_M", None, None, 128),
    _row("Llama-3.1-8B", "llama", LLAMA_3_8B, 131072, "Q4_K_M", 4_920_739_232, 4403.49, 128, rope_factors=64),
    _row("Llama-3.1-8B", "llama", LLAMA_3_8B, 131072, "Q8_0", 8_540_775_840, 7605.3, 128, rope_factors=64),
    _row(
        "Llama-3.1-70B",
        "llama",
        "80/8192/64/8/28672/128256",
        131072,
        "Q4_K_M",
        42_520_398_400,
        39_979,
        320,
        rope_factors=64,
    ),
    _row("deepseek-coder-33B", "llama", "62/7168/56/8/19200/32256", 16384, "Q4_K_M", 19.94e9, 18_892, 248),
    _row("Phi-3-mini-4k", "phi3", PHI_3, 4096, "Q4_K_M", 2_393_231_072, 2229, 384),
    _row("Phi-3-mini-4k", "phi3", PHI_3, 4096, "Q8_0", 4.06e9, 3773, 384),
    _row("phi-2", "phi2", "32/2560/32/32/10240/51200", 2048, "Q8_0", 2.958e9, 2687, 320),
    _row("stablelm-zephyr-3b", "stablelm", "32/2560/32/32/6912/50304", 4096, "Q8_0", 2.97e9, 2703, 320),
    _row("Qwen2.5-0.5B", "qwen2", "24/896/14/2/4864/151936", 32768, "Q4_K_M", 491_400_032, 374, 12),
    _row("Qwen2.5-1.5B", "qwen2", "28/1536/12/2/8960/151936", 32768, "Q4_K_M", 1_117_320_736, 935, 28),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.name}-{row.quantisation}")
def test_a_real_file_comes_out_of_its_counts(row):
    shape = planned_shape(row.counts, row.quantisation)
    if row.card_mib is not None:
        # The aim is 1 %; the rules are exact, and the table is rounded to MiB: one tensor of another type shows.
        assert (shape.tensor_bytes - shape.host_bytes) / 2**20 == pytest.approx(row.card_mib, abs=0.6)
    if row.file_bytes is not None:
        assert shape.file_bytes == pytest.approx(row.file_bytes, rel=0.002)
    assert kv_bytes_per_token(shape) == row.kv_kib * 1024


def test_the_file_sizes_given_win_over_the_computed_ones():
    assert planned_shape(TABLE[0].counts, "Q4_K_M", file_bytes=4_368_439_584).file_bytes == 4_368_439_584


def test_q4_k_m_keeps_the_first_the_last_and_every_third_layer_finer():
    kinds = {tensor.name: tensor.type for tensor in tensor_plan(TABLE[0].counts, "Q4_K_M")}
    finer = [layer for layer in range(32) if kinds[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert finer == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert finer == [layer for layer in range(32) if use_more_bits(layer, 32)]
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.5.attn_v.weight"] == "Q4_K"


def test_rows_that_are_no_multiple_of_256_fall_back():
    qwen = next(row for row in TABLE if row.name == "Qwen2.5-0.5B")
    kinds = {tensor.name: tensor.type for tensor in tensor_plan(qwen.counts, "Q4_K_M")}
    assert kinds["token_embd.weight"] == "Q5_0"
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q6_K"  # its rows are 4,864 = 19 x 256 long


def test_a_tied_output_is_no_second_table_and_stays_on_the_card():
    counts = Counts("qwen2", 2, 256, 4, 2, 512, 1000, 2048, tied=True)
    tensors = tensor_plan(counts, "Q4_K_M")
    assert "output.weight" not in {tensor.name for tensor in tensors}
    assert next(tensor for tensor in tensors if tensor.name == "token_embd.weight").type == "Q6_K"
    assert planned_shape(counts, "Q4_K_M").host_bytes == 0


@pytest.mark.parametrize(("architecture", "quantisation"), [("mamba", "Q8_0"), ("llama", "IQ2_XXS")])
def test_what_has_no_known_rules_is_refused(architecture, quantisation):
    with pytest.raises(ValueError, match="not known"):
        tensor_plan(Counts(architecture, 2, 256, 4, 2, 512, 1000, 2048), quantisation)
