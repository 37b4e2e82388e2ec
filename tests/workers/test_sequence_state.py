"""The file in which a running answer travels: what was written is read, and everything else reads as nothing."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tars.workers.generation import SavedCells
from tars.workers.sequence_state import MAGIC, read_state, write_state

TOKENS = [5, 6, 7, 8]
CELLS = SavedCells(bytes(range(200)), 3)


def new(folder: Path) -> Path:
    path = folder / "state"
    path.touch(0o600)
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=20),
    data=st.binary(min_size=1),
    share=st.floats(0, 1),
)
def test_what_was_written_is_read(tmp_path: Path, tokens: list[int], data: bytes, share: float) -> None:
    path = new(tmp_path)
    cells = SavedCells(data, 1 + int(share * (len(tokens) - 2)))
    assert write_state(path, tokens, cells) == path.stat().st_size
    assert read_state(path, tokens) == cells
    assert read_state(path, [*tokens, 1]) is None
    assert read_state(path, [tokens[0] + 1, *tokens[1:]]) is None


def test_cells_of_another_adapter_are_nobodys(tmp_path: Path) -> None:
    path = new(tmp_path)
    write_state(path, TOKENS, CELLS, "blue")
    assert read_state(path, TOKENS, "blue") == CELLS
    assert read_state(path, TOKENS, "red") is None
    assert read_state(path, TOKENS) is None


def test_an_answer_without_cells_has_none(tmp_path: Path) -> None:
    path = new(tmp_path)
    write_state(path, TOKENS, None)
    assert read_state(path, TOKENS) is None


def test_a_file_that_is_not_there_holds_none(tmp_path: Path) -> None:
    assert read_state(tmp_path / "nothing", TOKENS) is None
    assert read_state(tmp_path, TOKENS) is None


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no folder"):
        write_state(tmp_path / "no folder" / "state", TOKENS, CELLS)


def test_a_file_cut_anywhere_holds_none(tmp_path: Path) -> None:
    path = new(tmp_path)
    write_state(path, TOKENS, CELLS)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert read_state(path, TOKENS) is None, length
    path.write_bytes(content + b"more")
    assert read_state(path, TOKENS) is None


def test_a_flipped_bit_anywhere_holds_none(tmp_path: Path) -> None:
    path = new(tmp_path)
    write_state(path, TOKENS, CELLS)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert read_state(path, TOKENS) is None, place


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}", b"null", b"\xff", b'{"tokens": [5, 6, 7, 8]}', b'{"tokens": 4, "position": 3}', b"[" * 100_000]
    + [
        json.dumps({"tokens": TOKENS, "position": position, "adapter": ""}).encode()
        for position in (0, -1, 4, 5, True, 1.0, "3")
    ],
)
def test_a_header_of_another_kind_holds_none(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "state"
    rest = struct.pack("<I", len(header)) + header + CELLS.data
    path.write_bytes(MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest)
    assert read_state(path, TOKENS) is None


def test_the_layout_is_what_is_documented(tmp_path: Path) -> None:
    """Else the headers above would be refused for another reason than their content."""
    path = tmp_path / "state"
    header = json.dumps({"tokens": TOKENS, "position": 3, "adapter": ""}).encode()
    rest = struct.pack("<I", len(header)) + header + CELLS.data
    path.write_bytes(MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest)
    assert read_state(path, TOKENS) == CELLS
