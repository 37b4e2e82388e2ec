"""A listener on loopback that does with bytes what a test says, and leaves no socket behind."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a frozen process: its kernel takes the connection, and nobody says anything."""
    await reader.read()


async def sockets_closed(seconds: float = 5.0) -> None:
    """Wait until this loop has no open socket but its own: a connection that was in the middle of its TLS handshake when both ends were
    closed needs a moment to notice."""
    selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]  # there is no public way to ask
    async with asyncio.timeout(seconds):
        while len(selector.get_map()) > 1:  # noqa: ASYNC110  # the selector tells nobody
            await asyncio.sleep(0.01)


@asynccontextmanager
async def raw_server(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The port. At the end every connection was served to its end and is closed."""
    served: set[asyncio.Task[None]] = set()

    async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        try:
            with suppress(OSError):
                await serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(whole, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        if served:
            await asyncio.wait(served, timeout=5)
        await server.wait_closed()
