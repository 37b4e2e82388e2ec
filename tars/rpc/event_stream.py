"""An answer as server-sent events, of whichever face: its headers, its frames, and a comment now and then while there are none.

Law of this file: bytes only; what a frame says, when the first one goes out and what it means that the reader is gone is the face's.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic

from aiohttp import hdrs, web

from tars.rpc.whole_answer import REQUEST_ID_HEADER

HEARTBEAT = b": still here\n\n"
"""A comment: readers of event streams skip it, no proxy closes a silent stream, and writing to a connection that is gone fails."""

_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold the events back otherwise
}


class EventStream:
    """The answer to one request: `open`, `send`, `end`; `close` in any case. Writing to a reader that is gone raises `ConnectionError`."""

    def __init__(self, request: web.Request, call_id: str, heartbeat_seconds: float) -> None:
        self._request = request
        self._heartbeat_seconds = heartbeat_seconds
        self._last_write = 0.0
        self._heart: asyncio.Task[None] | None = None
        self.response = web.StreamResponse(headers={**_HEADERS, REQUEST_ID_HEADER: call_id})
        self.opened = False
        """Whether status and headers are out."""

    async def open(self) -> None:
        """Send status and headers; from now on the reader hears something at least every `heartbeat_seconds`."""
        await self.response.prepare(self._request)
        self.opened = True
        self._last_write = monotonic()
        self._heart = asyncio.create_task(self._beat())

    async def send(self, frame: bytes) -> None:
        """One event, or several."""
        self._last_write = monotonic()
        await self.response.write(frame)

    async def end(self, frame: bytes = b"") -> None:
        """The last event, where there is one: in one piece with the stream's end, so that its reader need not wait for that."""
        await self.response.write_eof(frame)

    def close(self) -> None:
        """No more heartbeats; idempotent."""
        if self._heart is not None:
            self._heart.cancel()

    async def _beat(self) -> None:
        with suppress(ConnectionError):
            while True:
                silent = monotonic() - self._last_write
                if silent >= self._heartbeat_seconds:
                    await self.send(HEARTBEAT)
                    silent = 0.0
                await asyncio.sleep(self._heartbeat_seconds - silent)
