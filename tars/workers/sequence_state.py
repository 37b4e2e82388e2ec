"""The file in which a running answer travels to another replica.

Law of this file: bytes only. A file that does not belong to the answer (another prompt, another version, cut short) reads as None: then its
tokens are computed again, which is slower and no error. Layout: the magic, the header's length (uint32, little-endian), the header (JSON:
`tokens`, `position`), llama.cpp's state of the first `position` tokens (llama_state_seq_get_data).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from tars.workers.generation import SavedCells

MAGIC = b"TARSSEQ1"

LENGTH = struct.Struct("<I")


def write_state(path: Path, tokens: Sequence[int], cells: SavedCells | None) -> int:
    """Write an answer's tokens (prompt and generated) and cells; the file's size in bytes. Raises `OSError`."""
    header = json.dumps({"tokens": list(tokens), "position": 0 if cells is None else cells.tokens}).encode()
    content = MAGIC + LENGTH.pack(len(header)) + header + (b"" if cells is None else cells.data)
    return path.write_bytes(content)


def read_state(path: Path, tokens: Sequence[int]) -> SavedCells | None:
    """The cells of an answer that has these tokens; None where the file holds none, or another's."""
    try:
        content = path.read_bytes()
        begin = len(MAGIC) + LENGTH.size
        (length,) = LENGTH.unpack(content[len(MAGIC) : begin])
        header = json.loads(content[begin : begin + length])
        position, saved = header["position"], header["tokens"]
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    if content[: len(MAGIC)] != MAGIC or saved != list(tokens) or type(position) is not int:
        return None
    data = content[begin + length :]
    return SavedCells(data, position) if 0 < position < len(saved) and data else None
