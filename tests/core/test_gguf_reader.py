"""tars/core/gguf_reader.py: values are read one after the other, and no number from the file is believed before it was checked."""

from __future__ import annotations

import struct

import pytest

from tars.core.gguf_reader import (
    MOST_NAME_BYTES,
    MOST_STRING_BYTES,
    MOST_STRINGS,
    SMALL_ARRAY,
    GgufArray,
    GgufError,
    GgufHeaderLonger,
    GgufReader,
    damaged,
    shown,
)

UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10


def reader(content: bytes, file_bytes: int | None = None) -> GgufReader:
    return GgufReader(memoryview(content), len(content) if file_bytes is None else file_bytes)


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    ("kind", "content", "value"),
    [
        (UINT8, b"\xff", 255),
        (INT32, struct.pack("<i", -5), -5),
        (UINT64, struct.pack("<Q", 2**63), 2**63),
        (FLOAT32, struct.pack("<f", 0.5), 0.5),
        (BOOL, b"\x02", True),
        (STRING, text("caf\u00e9".encode()), "caf\u00e9"),
        (STRING, text(b"caf\xe9"), "caf\ufffd"),
        (ARRAY, struct.pack("<IQ2h", 3, 2, -1, 7), (-1, 7)),
        (ARRAY, struct.pack("<IQ2B", BOOL, 2, 0, 1), (False, True)),
        (ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a") + text(b"bc"), GgufArray(STRING, 2, 12)),
    ],
)
def test_a_value_is_read_and_the_next_one_follows_it(kind: int, content: bytes, value: object) -> None:
    found = reader(content + b"next")
    assert found.value(kind) == value
    assert found.take(4) == b"next"
    assert found.left == 0


def test_short_number_lists_are_read_and_long_ones_only_counted() -> None:
    def numbers(count: int) -> bytes:
        return struct.pack("<IQ", INT32, count) + bytes(4 * count)

    assert reader(numbers(SMALL_ARRAY)).value(ARRAY) == (0,) * SMALL_ARRAY
    assert reader(numbers(SMALL_ARRAY + 1)).value(ARRAY) == GgufArray(INT32, SMALL_ARRAY + 1, 12)


def test_what_ends_too_early_says_whether_the_file_has_more() -> None:
    with pytest.raises(GgufError, match="truncated") as caught:
        reader(b"abc").uint32()
    assert not isinstance(caught.value, GgufHeaderLonger)
    with pytest.raises(GgufHeaderLonger, match="longer than the 3 bytes"):
        reader(b"abc", 100).uint32()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (STRING, struct.pack("<Q", MOST_STRING_BYTES) + b"a"),
        (ARRAY, struct.pack("<IQ", UINT64, 2**61)),
        (ARRAY, struct.pack("<IQ", STRING, MOST_STRINGS)),
        (ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a") + struct.pack("<Q", 2**62)),
        (ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a" * 8) + b"a"),
    ],
)
def test_a_list_that_the_bytes_cannot_hold_is_refused_before_it_is_made(kind: int, content: bytes) -> None:
    with pytest.raises(GgufError, match="truncated"):
        reader(content).value(kind)


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (77, b"", "unknown type 77"),
        (ARRAY, struct.pack("<IQ", ARRAY, 1), "elements of type 9"),
        (ARRAY, struct.pack("<IQ", STRING, MOST_STRINGS + 1), "more than 4,000,000 texts"),
        (STRING, text(bytes(MOST_STRING_BYTES + 1)), "claims to be 16,777,217 bytes"),
    ],
)
def test_a_value_that_no_real_file_has_is_damage(kind: int, content: bytes, said: str) -> None:
    with pytest.raises(GgufError, match=said):
        reader(content).value(kind)


def test_texts_of_all_lists_count_together() -> None:
    found = reader(
        b"".join([struct.pack("<IQ", STRING, 3), text(b"") * 3, struct.pack("<IQ", STRING, MOST_STRINGS - 2)])
    )
    found.value(ARRAY)
    with pytest.raises(GgufError, match="more than 4,000,000 texts"):
        found.value(ARRAY)


def test_a_name_is_short_and_utf_8() -> None:
    assert reader(text(b"a.b")).name("tensor name") == "a.b"
    with pytest.raises(GgufError, match="tensor name is not UTF-8"):
        reader(text(b"\xff")).name("tensor name")
    with pytest.raises(GgufError, match="metadata key claims to be 65,536 bytes"):
        reader(struct.pack("<Q", MOST_NAME_BYTES + 1)).name("metadata key")


def test_a_count_is_believed_where_it_is_usual_and_its_rows_may_be_there() -> None:
    found = reader(bytes(64))
    found.check_count("tensors", 2, most=10, least_bytes=32)
    with pytest.raises(GgufError, match="claims 11 tensors"):
        found.check_count("tensors", 11, most=10, least_bytes=1)
    with pytest.raises(GgufError, match="truncated"):
        found.check_count("tensors", 3, most=10, least_bytes=32)


def test_an_error_shows_no_more_of_a_name_than_a_line_holds() -> None:
    assert len(shown("a" * 1000)) == 82
    assert "Download" in str(damaged("it is odd"))
