"""tars/core/gguf.py: what the gguf package writes is read right, and nothing else gets further than one clear `GgufError`."""

from __future__ import annotations

import struct
from time import perf_counter

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.gguf import parse_gguf
from tars.core.gguf_reader import GgufError, GgufHeaderLonger
from tars.core.tensors import Tensor

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return pair(key, UINT32, struct.pack("<I", value))


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    row = text(name) + struct.pack("<I", len(dimensions)) + struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return row + struct.pack("<IQ", kind, offset)


def file_of(pairs=(), tensors=(), *, version=3, pair_count=None, tensor_count=None, data=0) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


MODEL = [
    pair("general.architecture", STRING, text("llama")),
    number("llama.block_count", 2),
    number("llama.embedding_length", 64),
    number("llama.attention.head_count", 4),
    number("llama.context_length", 128),
]


def parse(content: bytes):
    return parse_gguf(content, len(content))


def refused(content: bytes) -> str:
    with pytest.raises(GgufError) as caught:
        parse(content)
    return str(caught.value)


def shape_refused(content: bytes) -> str:
    with pytest.raises(GgufError) as caught:
        parse(content).shape()
    return str(caught.value)


# --- good files -------------------------------------------------------------------------------------------------------


def test_a_file_reads_as_the_gguf_package_reads_it(tiny_gguf):
    content = tiny_gguf.read_bytes()
    header = parse(content)
    oracle = gguf.GGUFReader(tiny_gguf)
    assert [(each.name, each.dimensions, each.type, each.nbytes) for each in header.tensors] == [
        (each.name, tuple(map(int, each.shape)), each.tensor_type.name, int(each.n_bytes)) for each in oracle.tensors
    ]
    assert [header.data_offset + each.offset for each in header.tensors] == [
        int(each.data_offset) for each in oracle.tensors
    ]
    scalars = {
        key: field.contents()
        for key, field in oracle.fields.items()
        if field.types[0] is not gguf.GGUFValueType.ARRAY and not key.startswith("GGUF.")
    }
    assert {key: header.metadata[key] for key in scalars} == scalars
    assert header.metadata.keys() == {key for key in oracle.fields if not key.startswith("GGUF.")}


def test_a_header_answers_what_a_node_asks(tiny_gguf):
    header = parse(tiny_gguf.read_bytes())
    assert header.architecture == "llama"
    assert header.name == "tiny random llama"
    assert header.tokenizer_model == "llama"
    assert "<|im_start|>" in header.chat_template
    assert header.context_length == 2048
    assert header.vocabulary_size == header.metadata["tokenizer.ggml.tokens"].count
    assert header.quantisation == "Q8_0"


def test_a_shape_has_the_counts_and_the_bytes(tiny_gguf):
    content = tiny_gguf.read_bytes()
    shape = parse(content).shape()
    assert (shape.layers, shape.embedding, shape.heads, shape.kv_heads, shape.feed_forward) == (2, 64, 4, 2, 128)
    assert (shape.key_length, shape.value_length, shape.context_trained) == (16, 16, 2048)
    oracle = {each.name: int(each.n_bytes) for each in gguf.GGUFReader(tiny_gguf).tensors}
    assert shape.tensor_bytes == sum(oracle.values())
    assert shape.host_bytes == oracle["token_embd.weight"]
    assert shape.file_bytes == len(content)


def test_version_2_and_an_own_alignment_are_read():
    alignment = number("general.alignment", 64)
    content = file_of([*MODEL, alignment], [tensor("a", (4,)), tensor("b", (4,), offset=64)], version=2)
    content += bytes(-len(content) % 64 + 80)
    header = parse(content)
    assert (header.version, header.alignment, header.data_offset % 64) == (2, 64, 0)
    assert header.tensors[1] == Tensor("b", (4,), "F32", 16, 64)


def test_a_mapped_view_is_read_like_bytes(tiny_gguf):
    content = tiny_gguf.read_bytes()
    assert parse_gguf(memoryview(bytearray(content)), len(content)) == parse(content)


def test_the_last_tensor_needs_no_padding_behind_it():
    content = file_of(MODEL, [tensor("a", (3,))], data=12)
    assert parse(content).tensors[0].nbytes == 12


def test_a_prefix_that_holds_the_header_is_enough_and_a_shorter_one_says_so(tiny_gguf):
    content = tiny_gguf.read_bytes()
    header = parse(content)
    assert parse_gguf(content[: header.data_offset], len(content)) == header
    with pytest.raises(GgufHeaderLonger, match="longer than"):
        parse_gguf(content[: header.data_offset // 2], len(content))


def test_head_counts_by_layer_count_as_their_mean_rounded_up():
    by_layer = struct.pack("<IQ3I", UINT32, 3, 2, 2, 1)
    assert parse(file_of([*MODEL, pair("llama.attention.head_count_kv", ARRAY, by_layer)])).shape().kv_heads == 2


def test_a_model_without_attention_has_no_kv_heads():
    pairs = [each for each in MODEL if b"head_count" not in each]
    shape = parse(file_of(pairs)).shape()
    assert (shape.heads, shape.kv_heads, shape.key_length) == (0, 0, 0)


def test_an_undeclared_quantisation_is_named_by_the_most_bytes():
    content = file_of(MODEL, [tensor("a", (64,), 0), tensor("b", (32, 100), 8, offset=256)], data=256 + 3400)
    assert parse(content).quantisation == "Q8_0"


def test_a_vocabulary_of_128k_tokens_and_280k_merges_is_passed_quickly():
    tokens = struct.pack("<IQ", STRING, 128_000) + text("token12") * 128_000
    merges = struct.pack("<IQ", STRING, 280_000) + text("tok en12") * 280_000
    content = file_of([*MODEL, pair("tokenizer.ggml.tokens", ARRAY, tokens), pair("merges", ARRAY, merges)])
    start = perf_counter()
    header = parse(content)
    assert perf_counter() - start < 2  # some 50 ms; the bound only catches a quadratic loop
    assert header.vocabulary_size == 128_000


# --- bad files --------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_called_empty():
    assert "empty" in refused(b"")


@pytest.mark.parametrize("content", [b"GG", b"PK\x03\x04" + bytes(100), b"hello, this is text\n" * 10, b"\x80\x04\x95"])
def test_other_formats_are_no_gguf(content):
    assert "not a GGUF file" in refused(content)


def test_big_endian_files_are_named_so():
    assert "big-endian" in refused(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))


@pytest.mark.parametrize("version", [1, 4, 99])
def test_other_versions_are_refused_by_number(version):
    assert f"format version {version}" in refused(file_of(version=version))


def test_every_truncation_of_a_header_is_refused(tiny_gguf):
    content = tiny_gguf.read_bytes()
    end = parse(content).data_offset
    for length in [*range(1, 600), *range(600, end, 97)]:
        assert refused(content[:length])


def test_truncated_data_tell_how_many_bytes_are_missing(tiny_gguf):
    content = tiny_gguf.read_bytes()
    header = parse(content)
    last = header.tensors[-1]
    content = content[: header.data_offset + last.offset + last.nbytes - 1234]
    assert "1,234 bytes of its tensors are missing" in refused(content)


def test_a_part_of_a_split_model_says_which_and_what_to_do():
    split = [pair("split.count", 2, struct.pack("<H", 3)), pair("split.no", 2, struct.pack("<H", 1))]
    message = refused(file_of([*MODEL, *split]))
    assert "part 2 of 3" in message
    assert "--merge" in message


@pytest.mark.parametrize("count", [100_000, 2**40, 2**64 - 1])
def test_absurd_counts_are_refused_before_anything_is_made_of_them(count):
    assert "claims" in refused(file_of(tensor_count=count))
    assert "claims" in refused(file_of(pair_count=count))


def test_counts_that_the_bytes_cannot_hold_are_refused():
    assert "truncated" in refused(file_of(tensor_count=5000))
    assert "truncated" in refused(file_of(pair_count=5000))


@pytest.mark.parametrize(
    "value",
    [
        pair("key", STRING, struct.pack("<Q", 2**63)),
        pair("key", ARRAY, struct.pack("<IQ", UINT64, 2**61)),
        pair("key", ARRAY, struct.pack("<IQ", STRING, 2**61)),
        pair("key", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", 2**62)),
        pair("key", ARRAY, struct.pack("<IQ", ARRAY, 1)),
        pair("key", ARRAY, struct.pack("<IQ", 77, 1)),
        pair("key", 77, b""),
        struct.pack("<Q", 2**62),
        text(b"\xff\xfe") + struct.pack("<II", UINT32, 1),
        number("key", 1) + number("key", 2),
    ],
)
def test_damaged_metadata_are_refused(value):
    pairs = 2 if value.count(b"key") == 2 else 1
    assert refused(file_of([value], pair_count=pairs) + bytes(64))


@pytest.mark.parametrize(
    "rows",
    [
        [tensor("a", ())],
        [tensor("a", (1, 1, 1, 1, 1))],
        [tensor("a", (0, 4))],
        [tensor("a", (2**40, 2**40))],
        [tensor("a", (4,), kind=4)],
        [tensor("a", (100,), kind=8)],
        [tensor("a", (4,), offset=32)],
        [tensor("a", (4,)), tensor("b", (4,), offset=16)],
        [tensor("a", (4,)), tensor("a", (4,), offset=32)],
    ],
)
def test_impossible_tensors_are_refused_by_name(rows):
    message = refused(file_of(MODEL, rows, data=4096))
    assert "'a'" in message or "'b'" in message


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment):
    assert "alignment" in refused(file_of([number("general.alignment", alignment)]))


def test_a_file_without_a_model_has_no_shape():
    assert "architecture" in shape_refused(file_of())
    for missing in ("block_count", "embedding_length", "context_length"):
        pairs = [each for each in MODEL if missing.encode() not in each]
        assert missing in shape_refused(file_of(pairs))


def test_a_count_that_is_no_count_is_refused():
    wrong = pair("llama.block_count", FLOAT32, struct.pack("<f", 2.0))
    assert "not a count" in shape_refused(file_of([each for each in MODEL if b"block_count" not in each] + [wrong]))


def test_texts_that_are_not_utf8_do_not_refuse_a_good_model():
    header = parse(file_of([*MODEL, pair("general.name", STRING, text(b"caf\xe9"))]))
    assert header.name == "caf\ufffd"


SMALL = file_of(
    [
        *MODEL,
        pair("general.name", STRING, text("small")),
        pair("yes", BOOL, b"\x01"),
        pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("bc") + text("d")),
        pair("scores", ARRAY, struct.pack("<IQ3f", FLOAT32, 3, 0, 1, 2)),
    ],
    [tensor("token_embd.weight", (64, 3)), tensor("blk.0.attn_q.weight", (64, 64), kind=8, offset=768)],
    data=768 + 4352,
)


def test_the_fuzzed_file_is_good_before_it_is_fuzzed():
    assert parse(SMALL).shape().vocabulary == 3


@settings(max_examples=4 * settings().max_examples)
@given(
    st.lists(st.tuples(st.integers(0, 900), st.binary(min_size=1, max_size=9)), max_size=4),
    st.none() | st.integers(0, len(SMALL)),
)
def test_a_mutated_file_raises_nothing_but_its_own_error(changes, length):
    content = bytearray(SMALL[:length])
    for at, replacement in changes:
        content[at : at + len(replacement)] = replacement
    try:
        header = parse(bytes(content))
        header.shape()
        assert header.quantisation
        assert header.name is not None
    except GgufError as error:
        said = str(error)
    else:
        said = "nothing is wrong with it"
    assert 20 < len(said) < 500


@settings(max_examples=2 * settings().max_examples)
@given(st.binary(max_size=400))
def test_any_bytes_behind_the_magic_raise_nothing_but_its_own_error(content):
    for start in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF" + struct.pack("<IQQ", 3, 1, 2)):
        try:
            parse(start + content)
        except GgufError:
            continue
