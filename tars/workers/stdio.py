"""JSON-RPC messages over a byte stream, framed as the Language Server Protocol frames them.

Law of this file: `Framer` is pure (bytes in, messages out) and owns no stream; the asyncio piece below only moves bytes. Nothing here
knows what a message means. A stream that breaks the framing cannot be trusted any more: there is no resynchronising.

A frame is `Content-Length: <bytes>\\r\\n`, optionally other headers, an empty line, then so many bytes of UTF-8 JSON
(Language Server Protocol 3.17, "Base Protocol").
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

HEADER_MOST = 4_096
"""Bytes of all headers of one frame. Ours take 25; LSP clients send one more (`Content-Type`)."""

BODY_MOST = 128 * 2**20
"""Bytes of one message: three times the largest honest one, 2,048 texts of 4,096-dimensional float32 vectors in base64 (43 MiB)."""

READ_SIZE = 256 * 1024
"""Bytes asked of the pipe at once: four times a Linux pipe's buffer, so that one read empties it."""


class FramingError(Exception):
    """The stream does not carry `Content-Length` frames of JSON objects; it has to be closed."""


def frame(message: dict[str, Any]) -> bytes:
    """One message as bytes on the wire.

    Raises `TypeError` (orjson's `JSONEncodeError`) for what JSON cannot carry: lone surrogates, integers over 64 bits, more than 254
    levels.
    """
    body = orjson.dumps(message)
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class Framer:
    """Takes bytes as they come and gives whole messages. After a `FramingError` it refuses everything."""

    def __init__(self, header_most: int = HEADER_MOST, body_most: int = BODY_MOST) -> None:
        self._header_most = header_most
        self._body_most = body_most
        self._buffer = bytearray()
        self._body_length: int | None = None
        self._broken: str | None = None

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that `data` completes, in order. Raises `FramingError`."""
        if self._broken is not None:
            raise FramingError(self._broken)
        self._buffer += data
        messages: list[dict[str, Any]] = []
        try:
            while (body := self._next_body()) is not None:
                messages.append(_decode(body))
        except FramingError as error:
            self._broken = str(error)
            self._buffer.clear()
            raise
        return messages

    def end(self) -> None:
        """Say that the stream is over. Raises `FramingError` where it ended inside a frame."""
        if self._broken is None and (self._buffer or self._body_length is not None):
            raise FramingError("the stream ended inside a frame")

    def _next_body(self) -> bytes | None:
        if self._body_length is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end > self._header_most or (end < 0 and len(self._buffer) > self._header_most):
                raise FramingError(f"no end of headers within {self._header_most} bytes")
            if end < 0:
                # Garbage is refused at its first line instead of after 4 KiB that may never come.
                line_end = self._buffer.find(b"\r\n")
                if line_end >= 0 or b"\n" in self._buffer:
                    _header(bytes(self._buffer[: line_end if line_end >= 0 else None]))
                return None
            self._body_length = _content_length(bytes(self._buffer[:end]), self._body_most)
            del self._buffer[: end + 4]
        if len(self._buffer) < self._body_length:
            return None
        body = bytes(self._buffer[: self._body_length])
        del self._buffer[: self._body_length]
        self._body_length = None
        return body


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not name or b"\n" in line or not name.replace(b"-", b"").isalnum():
        raise FramingError("a line is not a header: something else writes to this stream")
    return name.strip().lower(), value.strip()


def _content_length(headers: bytes, body_most: int) -> int:
    lengths = [value for name, value in map(_header, headers.split(b"\r\n")) if name == b"content-length"]
    if len(lengths) != 1 or not lengths[0].isdigit():
        raise FramingError("a frame needs exactly one Content-Length of digits")
    # isdigit first, then a length check: int() of megabytes of digits is quadratic (and refused by Python above 4,300).
    if len(lengths[0]) > 12 or int(lengths[0]) > body_most:
        raise FramingError(f"a frame announces more than {body_most} bytes")
    return int(lengths[0])


def _decode(body: bytes) -> dict[str, Any]:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise FramingError("a frame's body is not JSON") from None
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise FramingError("a frame's body is not a JSON-RPC 2.0 message")
    return message


class MessageReader:
    """Messages from an asyncio stream, as lists: everything that one read completed."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._framer = Framer()

    async def read(self) -> list[dict[str, Any]] | None:
        """The next messages (at least one); None at the clean end of the stream. Raises `FramingError`."""
        while True:
            data = await self._stream.read(READ_SIZE)
            if not data:
                self._framer.end()
                return None
            if messages := self._framer.feed(data):
                return messages
