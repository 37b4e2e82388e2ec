"""A small JSON answer written to the connection in one piece: status line, headers and body in a single write.

Law of this file: it changes how the bytes get out, never which ones matter. Wherever anything was added to the answer (a header, a
cookie, compression, a signal), or the connection is not plain HTTP/1.1 keep-alive, aiohttp's own way is taken, whose header
building costs about as much as all of TARS's own part of a `node.ping` (`scripts/bench rpc`).
"""

from __future__ import annotations

from email.utils import formatdate
from time import time

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

REQUEST_ID_HEADER = "X-Request-Id"
"""Carries a call's id; the OpenAI clients show it as `_request_id`."""
JSON_HEADERS = CIMultiDict({hdrs.CONTENT_TYPE: "application/json"})

_LARGEST_WHOLE = 16 * 1024
"""Above it copying costs more than a second write, and aiohttp's flow control must see the answer."""


class WholeAnswer(web.Response):
    """A 200 with a JSON body. `call_id`: of the one call that it answers, hexadecimal."""

    def __init__(self, body: bytes, call_id: str = "") -> None:
        super().__init__(body=body, headers=JSON_HEADERS)
        if call_id:
            self.headers[REQUEST_ID_HEADER] = call_id
        self._call_id = call_id
        self._whole_body = body
        self._written = False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write everything, where nothing speaks against it."""
        body = self._whole_body
        transport = request.transport
        if (
            len(body) > _LARGEST_WHOLE
            or len(self.headers) != (2 if self._call_id else 1)
            or self.status != 200
            or self.body is not body
            or self.compression
            or self.chunked
            or self._cookies  # the public property would make an empty jar for every answer
            or super().keep_alive is False
            or not request.keep_alive
            or request.method == hdrs.METH_HEAD
            or request.version != HttpVersion11
            or not isinstance(request, web.Request)
            or request.app.on_response_prepare
            or transport is None
        ):
            return await super().prepare(request)
        named = b"X-Request-Id: %b\r\n" % self._call_id.encode() if self._call_id else b""
        transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\nDate: %b\r\n\r\n%b"
            % (named, len(body), _date(int(time())), body)
        )
        self._written = True
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do where `prepare` wrote it all."""
        if not self._written:
            await super().write_eof(data)

    @property
    def keep_alive(self) -> bool | None:
        """The connection stays open where the answer was written whole."""
        return True if self._written else super().keep_alive


_last_date = (0, b"")


def _date(second: int) -> bytes:
    """RFC 9110's Date, made once a second."""
    global _last_date
    if _last_date[0] != second:
        _last_date = (second, formatdate(second, usegmt=True).encode())
    return _last_date[1]
