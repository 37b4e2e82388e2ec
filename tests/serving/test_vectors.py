"""A worker's vectors as JSON: the same numbers by either way, in pieces."""

import asyncio
import base64
import random
import struct

import orjson
import pytest

from tars.errors import InternalError
from tars.serving import vectors
from tars.serving.vectors import VALUES_AT_ONCE, written


def packed(*values):
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def single(value):
    """The float32 that a number means."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


@pytest.fixture(params=["numpy", "without numpy"])
def way(request, monkeypatch):
    if request.param == "without numpy":
        monkeypatch.setattr(vectors, "numpy", None)


@pytest.mark.usefixtures("way")
async def test_every_float_comes_back_as_the_very_same_float32():
    draw = random.Random(7)
    values = [draw.uniform(-1, 1) for _ in range(384)] + [0.0, -0.0, 1e-30, 1.17549435e-38, 1.0]
    texts, size = await written([packed(*values), packed(*values[:2])], "float")
    document = orjson.dumps(texts)
    assert [list(map(single, vector)) for vector in orjson.loads(document)] == [
        list(map(single, values)),
        list(map(single, values[:2])),
    ]
    assert size == len(document) - len("[,]")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
async def test_what_is_no_number_is_an_error_and_never_a_null(bad):
    with pytest.raises(InternalError):
        await written([packed(1.0, bad, -1.0)], "float")
    with pytest.raises(InternalError):
        await written([packed(float("inf"), float("-inf"))], "float")


@pytest.mark.parametrize("output_type", ["int8", "binary"])
async def test_bytes_become_signed_whole_numbers(output_type):
    texts, _ = await written([base64.b64encode(bytes([0, 127, 128, 255])).decode()], output_type)
    assert orjson.loads(orjson.dumps(texts)) == [[0, 127, -128, -1]]


async def test_others_have_their_turn_while_a_large_answer_is_written():
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    many = [packed(*[0.5] * 1024)] * (8 * VALUES_AT_ONCE // 1024)
    await written(many, "float")
    beside.cancel()
    assert turns >= 8
