"""Event streams on a real server: heartbeats while nothing comes and only then, and a reader that leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from tars.rpc.event_stream import HEARTBEAT, EventStream
from tars.rpc.listener import listen

BOUND = 5.0


@asynccontextmanager
async def answered_by(
    serve: Callable[[EventStream], Awaitable[None]], heartbeat_seconds: float
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to one request, as it begins; `serve` sends what it sends."""

    async def handle(request: web.Request) -> web.StreamResponse:
        stream = EventStream(request, "0a" * 16, heartbeat_seconds)
        try:
            await serve(stream)
        finally:
            stream.close()
        return stream.response

    app = web.Application()
    app.router.add_get("/", handle)
    listener = await listen(app, "127.0.0.1", 0, None, shutdown_seconds=0.1)
    try:
        async with (
            asyncio.timeout(BOUND),
            aiohttp.ClientSession() as session,
            session.get(listener.url + "/") as response,
        ):
            yield response
    finally:
        await listener.close()


async def test_a_silent_stream_carries_heartbeats_and_then_its_events() -> None:
    heard = asyncio.Event()

    async def serve(stream: EventStream) -> None:
        assert not stream.opened
        await stream.open()
        assert stream.opened
        await heard.wait()
        await stream.send(b"data: 1\n\n")
        await stream.end()

    async with answered_by(serve, 0.01) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert (response.headers["X-Request-Id"], response.headers["Cache-Control"]) == ("0a" * 16, "no-store")
        for _ in range(2):
            assert await response.content.readuntil(b"\n\n") == HEARTBEAT
        heard.set()
        rest = await response.read()
        assert rest.replace(HEARTBEAT, b"") == b"data: 1\n\n"


async def test_the_last_event_comes_in_one_piece_with_the_end() -> None:
    async def serve(stream: EventStream) -> None:
        await stream.open()
        written: list[bytes] = []
        protocol = stream.response._payload_writer
        assert protocol is not None
        write = protocol._writelines
        protocol._writelines = lambda parts: (written.append(b"".join(parts)), write(parts))[1]  # type: ignore[attr-defined,method-assign]
        await stream.end(b"data: 1\n\n")
        assert written[-1].endswith(b"data: 1\n\n\r\n0\r\n\r\n")

    async with answered_by(serve, 1.0) as response:
        assert await response.read() == b"data: 1\n\n"


async def test_a_stream_that_is_never_silent_for_so_long_carries_none() -> None:
    async def serve(stream: EventStream) -> None:
        await stream.open()
        for _ in range(40):
            await stream.send(b"data: 1\n\n")
            await asyncio.sleep(0.01)
        await stream.end()

    async with answered_by(serve, 0.25) as response:
        assert await response.read() == b"data: 1\n\n" * 40


async def test_what_is_sent_to_a_reader_that_left_is_a_connection_error() -> None:
    raised: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def serve(stream: EventStream) -> None:
        await stream.open()
        try:
            while True:
                await stream.send(b"data: 1\n\n")
                await asyncio.sleep(0)
        except BaseException as error:
            raised.set_result(error)
            raise

    async with answered_by(serve, 10.0) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
        # The server may notice first, and then it cancels its handler.
        assert isinstance(await raised, ConnectionError | asyncio.CancelledError)
