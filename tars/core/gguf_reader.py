"""The values of a GGUF header, read one after the other from bytes that nobody vouches for.

Law of this file: bytes in, values out; what a value means is `gguf`'s. Nothing is allocated or repeated by a number from the file before
that number was checked against the bytes that are there, so that a hostile header costs as little as a good one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_STRINGS = 4_000_000
"""In all arrays together. The largest vocabularies have 262,144 tokens and about twice as many merges."""
MOST_STRING_BYTES = 16 * 2**20
"""One string. The longest in use are chat templates (tens of KiB) and, in T5 files, a precompiled character map (a few hundred KiB)."""
MOST_NAME_BYTES = 65_535
"""One metadata key (the format's own bound); tensor names are shorter (64)."""
SMALL_ARRAY = 4096
"""Numeric arrays up to this length are read (a head count per layer); longer ones, which belong to the tokenizer, are only counted."""


class GgufError(ValueError):
    """The bytes are no GGUF file that TARS can serve. The message says what is wrong and what to do, and names no path."""


class GgufHeaderLonger(GgufError):
    """The header does not end within the bytes given, and the file has more: read more of it and try again."""


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array that was counted and skipped: `count` elements of value type `type` from `offset` on."""

    type: int
    count: int
    offset: int


def shown(name: str) -> str:
    """A name from the file as a message may show it."""
    return repr(name[:80])


def damaged(what: str) -> GgufError:
    """The error for a header that says what cannot be."""
    return GgufError(f"The file's header is damaged: {what}. Download or convert it again.")


_STRING = 8
_ARRAY = 9
_BOOL = 7
_SCALARS: dict[int, struct.Struct] = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_UINT32 = _SCALARS[4]
_UINT64 = _SCALARS[10]


class GgufReader:
    """A cursor over the header that checks every step against the bytes left: each raises `GgufError` and nothing else."""

    def __init__(self, view: memoryview, file_bytes: int):
        self.view = view
        self.file_bytes = file_bytes
        self.at = 0
        self.strings = 0

    @property
    def left(self) -> int:
        """Bytes behind the cursor."""
        return len(self.view) - self.at

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > self.left:
            raise self._ran_out()
        start, self.at = self.at, self.at + size
        return bytes(self.view[start : self.at])

    def uint32(self) -> int:
        """The next four bytes."""
        return int(_UINT32.unpack(self.take(4))[0])

    def uint64(self) -> int:
        """The next eight bytes."""
        return int(_UINT64.unpack(self.take(8))[0])

    def check_count(self, what: str, count: int, *, most: int, least_bytes: int) -> None:
        """Refuse a list of more than `most` rows, and one whose rows cannot be there."""
        if count > most:
            raise damaged(f"it claims {count:,} {what}, more than any real file has ({most:,})")
        if count * least_bytes > self.left:
            raise self._ran_out()

    def name(self, what: str) -> str:
        """A short text that must be UTF-8; `what` says of what it is the name."""
        length = self.uint64()
        if length > MOST_NAME_BYTES:
            raise damaged(f"a {what} claims to be {length:,} bytes long")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise damaged(f"a {what} is not UTF-8 text") from None

    def value(self, kind: int) -> Any:
        """A metadata value of this type number."""
        if kind == _ARRAY:
            return self._array()
        if kind == _STRING:
            length = self.uint64()
            if length > MOST_STRING_BYTES:
                raise damaged(f"a text in its metadata claims to be {length:,} bytes long")
            # Not strict: a stray byte in a description must not keep a good model from being served.
            return self.take(length).decode(errors="replace")
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise damaged(f"a metadata value has the unknown type {kind}")
        number = scalar.unpack(self.take(scalar.size))[0]
        return bool(number) if kind == _BOOL else number

    def _array(self) -> tuple[Any, ...] | GgufArray:
        kind = self.uint32()
        count = self.uint64()
        start = self.at
        if kind == _STRING:
            self._skip_strings(count)
            return GgufArray(kind, count, start)
        scalar = _SCALARS.get(kind)
        if scalar is None:
            # Arrays of arrays are in the format's description and in no file; llama.cpp refuses them too.
            raise damaged(f"an array in its metadata has elements of type {kind}")
        if count * scalar.size > self.left:
            raise self._ran_out()
        self.at += count * scalar.size
        if count > SMALL_ARRAY:
            return GgufArray(kind, count, start)
        numbers = (row[0] for row in scalar.iter_unpack(self.view[start : self.at]))
        return tuple(map(bool, numbers)) if kind == _BOOL else tuple(numbers)

    def _skip_strings(self, count: int) -> None:
        # The one loop that a vocabulary of 128k tokens and 280k merges runs through: kept to one unpack and one addition a string.
        self.strings += count
        if self.strings > MOST_STRINGS:
            raise damaged(f"its lists hold more than {MOST_STRINGS:,} texts")
        if count * 8 > self.left:
            raise self._ran_out()
        unpack: Callable[..., tuple[int]] = _UINT64.unpack_from
        view, at = self.view, self.at
        last = len(view) - 8
        for _ in range(count):
            if at > last:
                raise self._ran_out()
            at += 8 + unpack(view, at)[0]
        if at > len(view):
            raise self._ran_out()
        self.at = at

    def _ran_out(self) -> GgufError:
        if self.file_bytes > len(self.view):
            return GgufHeaderLonger(
                f"The header is longer than the {len(self.view):,} bytes of it that were read, or is damaged."
            )
        return GgufError(
            f"The file is truncated or damaged: its header does not end within its {self.file_bytes:,} bytes. Download it again."
        )
