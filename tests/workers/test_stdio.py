"""Framing: whatever the borders of the reads, the same messages; whatever garbage, one clear error and bounded memory."""

from __future__ import annotations

import asyncio
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.workers.stdio import Framer, FramingError, MessageReader, frame

MESSAGES = [
    {"jsonrpc": "2.0", "id": 1, "method": "a", "params": {"text": "é\r\n\r\nContent-Length: 3\r\n\r\n"}},
    {"jsonrpc": "2.0", "method": "b"},
    {"jsonrpc": "2.0", "id": 2, "result": "x" * 5000},
]
STREAM = b"".join(map(frame, MESSAGES))


def test_the_frame_is_that_of_the_language_server_protocol() -> None:
    assert frame({"jsonrpc": "2.0", "id": 1}) == b'Content-Length: 24\r\n\r\n{"jsonrpc":"2.0","id":1}'


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_messages_do_not_depend_on_how_the_bytes_arrive(borders: list[int]) -> None:
    framer = Framer()
    cuts = [0, *sorted(borders), len(STREAM)]
    messages = [message for start, end in pairwise(cuts) for message in framer.feed(STREAM[start:end])]
    assert messages == MESSAGES
    framer.end()


def test_one_byte_at_a_time() -> None:
    framer = Framer()
    assert [message for byte in STREAM for message in framer.feed(bytes([byte]))] == MESSAGES


def test_other_headers_are_allowed_and_names_have_no_case() -> None:
    body = b'{"jsonrpc":"2.0"}'
    data = b"Content-Type: application/vscode-jsonrpc; charset=utf-8\r\ncontent-LENGTH:17\r\n\r\n" + body
    assert Framer().feed(data) == [{"jsonrpc": "2.0"}]


@pytest.mark.parametrize(
    "garbage",
    [
        b"llama_model_loader: loaded meta data\n",
        b"hello\r\n",
        b"\r\n\r\n",
        b"Content-Length: 5\r\n\r\nloud!",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 1_0\r\n\r\n",
        b"Content-Length: " + b"9" * 3000 + b"\r\n\r\n",
        b"Content-Length: 999999999\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Type: json\r\n\r\n",
        b'Content-Length: 15\r\n\r\n{"jsonrpc":"1"}',
        b"Content-Length: 2\r\n\r\n[]",
        b"Content-Length: 1\r\n\r\n\xff",
        b"x" * 5000,
    ],
)
def test_garbage_is_an_error_and_nothing_is_read_after_it(garbage: bytes) -> None:
    framer = Framer()
    with pytest.raises(FramingError):
        framer.feed(garbage)
    with pytest.raises(FramingError):
        framer.feed(STREAM)


@given(st.binary(max_size=300))
def test_any_bytes_give_messages_a_wait_or_a_framing_error(data: bytes) -> None:
    framer = Framer(header_most=64, body_most=64)
    try:
        assert framer.feed(data) == []
    except FramingError:
        return
    assert len(framer._buffer) <= 64 + 4 + 64


def test_an_end_inside_a_frame_is_an_error_and_between_frames_is_none() -> None:
    for cut in (1, 10, 25, len(STREAM) - 1):
        framer = Framer()
        framer.feed(STREAM[:cut])
        with pytest.raises(FramingError):
            framer.end()
    Framer().end()


@pytest.mark.parametrize("value", ["\ud800", 2**70])
def test_what_json_cannot_carry_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises(TypeError):
        frame({"value": value})


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


async def test_a_reader_over_a_real_pipe() -> None:
    read_end, write_end = os.pipe()
    stream = asyncio.StreamReader()
    with os.fdopen(read_end, "rb") as pipe:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), pipe
        )
        reader = MessageReader(stream)
        big = {"jsonrpc": "2.0", "result": "y" * 500_000}
        # Larger than a pipe's buffer: it comes in several reads.
        writing = asyncio.create_task(asyncio.to_thread(write_all, write_end, frame(big) + STREAM))
        received: list[dict[str, object]] = []
        while len(received) < 4:
            received += await reader.read() or []
        await writing
        assert received == [big, *MESSAGES]
        os.close(write_end)
        assert await reader.read() is None
        transport.close()
