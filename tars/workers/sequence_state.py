"""The file in which a running answer travels to another replica.

Law of this file: bytes only. A file that does not belong to the answer (another prompt, adapter or version, cut short) reads as None: then
its tokens are computed again, which is slower and no error. Layout: the magic, the header's length (uint32, little-endian), the header
(JSON: `tokens`, `position`, `adapter`), llama.cpp's state of the first `position` tokens (llama_state_seq_get_data).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from tars.workers.generation import SavedCells

MAGIC = b"TARSSEQ1"

PREFIX = struct.Struct("<8sII")
"""Magic, checksum, the header's length; the checksum covers the length too."""


def write_state(path: Path, tokens: Sequence[int], cells: SavedCells | None, adapter: str = "") -> int:
    """Write an answer's tokens (prompt and generated) and cells into an existing file; its size in bytes. Raises `OSError`."""
    position = 0 if cells is None else cells.tokens
    header = json.dumps({"tokens": list(tokens), "position": position, "adapter": adapter}).encode()
    data = b"" if cells is None else cells.data
    # Never made here: whoever gave up waiting for it has removed it, and a new one would be readable by others and nobody's to delete.
    with open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC), "wb") as file:
        # One after the other: a copy that holds both would be as large as the cells once more.
        file.write(PREFIX.pack(MAGIC, _checksum(header, data), len(header)))
        file.write(header)
        file.write(data)
    return PREFIX.size + len(header) + len(data)


def read_state(path: Path, tokens: Sequence[int], adapter: str = "") -> SavedCells | None:
    """The cells of an answer that has these tokens and this adapter; None where the file holds none, or another's, or is damaged."""
    try:
        with path.open("rb") as file:
            magic, checksum, length = PREFIX.unpack(file.read(PREFIX.size))
            header_text, data = file.read(length), file.read()
        if magic != MAGIC or len(header_text) != length or checksum != _checksum(header_text, data):
            return None
        header = json.loads(header_text)
        position, saved, computed_with = header["position"], header["tokens"], header["adapter"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError, struct.error):
        return None
    if saved != list(tokens) or computed_with != adapter or type(position) is not int:
        return None
    return SavedCells(data, position) if 0 < position < len(saved) and data else None


def _checksum(header: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(header, zlib.crc32(struct.pack("<I", len(header)))))
