"""tars/core/tensors.py: bytes that follow from dimensions and types, against the gguf package."""

from __future__ import annotations

import gguf
import pytest

from tars.core.tensors import BLOCKS, TENSOR_TYPES, Tensor, host_bytes, layer_bytes, tensor_bytes, tensor_nbytes
from tars.core.types import Bytes


def _tensor(name: str, nbytes: int) -> Tensor:
    return Tensor(name, (nbytes // 4,), "F32", Bytes(nbytes))


def test_every_type_has_the_block_sizes_of_the_gguf_package():
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind.value in TENSOR_TYPES:
            name, elements, size = TENSOR_TYPES[kind.value]
            assert (name, (elements, size)) == (kind.name, sizes)


def test_the_types_in_use_are_known():
    assert {"F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"} <= BLOCKS.keys()


def test_a_table_of_mistral_takes_its_blocks():
    # Field notes: Q4_K is 144 bytes per 256 elements.
    assert tensor_nbytes((4096, 32000), "Q4_K") == 4096 * 32000 // 256 * 144


@pytest.mark.parametrize(("dimensions", "kind"), [((), "F32"), ((100, 2), "Q8_0"), ((896, 4), "Q4_K")])
def test_rows_that_are_no_whole_number_of_blocks_are_refused(dimensions, kind):
    with pytest.raises(ValueError, match="multiple"):
        tensor_nbytes(dimensions, kind)


def test_the_embedding_table_stays_on_the_host():
    tensors = [_tensor("token_embd.weight", 400), _tensor("blk.0.attn_q.weight", 40), _tensor("output.weight", 4)]
    assert host_bytes(tensors) == 400
    assert tensor_bytes(tensors) == 444


def test_an_embedding_table_that_is_also_the_output_goes_to_the_card():
    assert host_bytes([_tensor("token_embd.weight", 400), _tensor("blk.0.attn_q.weight", 40)]) == 0


def test_position_tables_stay_on_the_host_even_so():
    assert host_bytes([_tensor("token_embd.weight", 400), _tensor("position_embd.weight", 8)]) == 8


def test_each_layer_is_counted_apart_and_tables_are_not():
    tensors = [
        _tensor("token_embd.weight", 400),
        _tensor("blk.0.attn_q.weight", 40),
        _tensor("blk.0.attn_k.weight", 4),
        _tensor("blk.1.attn_q.weight", 8),
        _tensor("blk.7.attn_q.weight", 16),
        _tensor("blk.x.attn_q.weight", 16),
        _tensor("blk." + "9" * 5000, 16),
        _tensor("output.weight", 4),
    ]
    assert layer_bytes(tensors, 2) == (44, 8)
