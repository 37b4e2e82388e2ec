"""A worker's vectors as the JSON that a caller reads.

Law of this file: base64 in, JSON text out, in pieces, so that a large answer (2,048 vectors of 1,024 values are 26 MB of JSON and take
some tenths of a second) never holds the event loop for more than a few milliseconds. A vector never becomes a list of Python floats
where numpy is there, which costs twice the time and more than twice the bytes: orjson writes a float32 of numpy's with the fewest
digits that mean it, and a Python float with all 17.
"""

from __future__ import annotations

import asyncio
import base64
import math
import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import orjson

from tars.errors import InternalError

try:
    import numpy
except ImportError:  # a node without an engine: the vectors come from other ones
    numpy = None  # type: ignore[assignment]  # the import's absence, asked for below

OutputType = Literal["float", "int8", "binary"]

VALUES_AT_ONCE = 2**15
"""Values that are written before the event loop may go on: 2 to 8 ms, measured on two busy cores."""


async def written(vectors: Sequence[str], output_type: OutputType) -> tuple[list[orjson.Fragment], int]:
    """JSON text of each vector (an array of numbers), and the bytes that all of them take.

    `vectors` is base64 of little-endian values: float32, or int8 for `int8` and `binary`. Raises `InternalError` for what is not finite.
    """
    texts: list[orjson.Fragment] = []
    size = since = 0
    for vector in vectors:
        data = base64.b64decode(vector)
        text = _floats(data) if output_type == "float" else orjson.dumps(array("b", data).tolist())
        texts.append(orjson.Fragment(text))
        size += len(text)
        since += len(data) // 4 if output_type == "float" else len(data)
        if since >= VALUES_AT_ONCE:
            since = 0
            await asyncio.sleep(0)
    return texts, size


def _floats(data: bytes) -> bytes:
    if numpy is not None and sys.byteorder == "little":
        values = numpy.frombuffer(data, "<f4")
        finite, text = math.isfinite(values.dot(values)), orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
    else:
        packed = array("f", data)
        if sys.byteorder == "big":
            packed.byteswap()
        plain = packed.tolist()
        finite, text = math.isfinite(math.fsum(map(abs, plain))), orjson.dumps(plain)
    if not finite:
        # orjson writes null for NaN: a vector with a hole in it would look like an answer.
        raise InternalError("The model gave a vector that holds no numbers; report it with the trace id.")
    return text
