"""Binds an address and serves an application there: the aiohttp settings that TARS relies on, in one place.

Law of this file: `handler_cancellation=True` always (without it aiohttp lets the work of a caller who left run on, on the GPU
too), no access log (the call log counts, and a line per call costs more than `node.ping`), and no socket outlives `close`.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import sys
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from tars.errors import ConfigError
from tars.rpc.access import Access

_KEEPALIVE_SECONDS = 75.0
"""Longer than the 60 s after which common proxies drop an idle connection, so that they close first and no call meets a closing one."""
_BACKLOG = 1024
"""Connections that wait to be accepted: a burst of 256 callers must not be refused by the kernel."""
_LINGERING_SECONDS = 2.0
"""How long the rest of a refused body is read and thrown away, so that its sender meets the refusal and not a reset. aiohttp's 10 s
would let a compression bomb keep the processor busy for as long."""
_SILENT_SECONDS = 30.0
"""How long a new connection may take to send the headers of its first request (later ones are under `_KEEPALIVE_SECONDS`). Whoever
opens connections and says nothing would otherwise hold all of the node's descriptors for ever, without a key."""
_OPEN_FILES = 65_536
"""Descriptors to ask the system for, where it allows so many: many start a process with 1,024, fewer than a busy LAN keeps open."""
_SHUTDOWN_SECONDS = 5.0
"""How long running answers may still take after `close`; the node has drained before it calls that."""


@dataclass(slots=True)
class Listener:
    """A server under way. `host` and `port` are what was really bound."""

    host: str
    port: int
    _runner: web.AppRunner
    _reaper: asyncio.Task[None] | None = None
    scheme: str = "http"

    @property
    def url(self) -> str:
        """Where the node answers on this PC: `http://127.0.0.1:8000`; "all addresses" is none that one can go to, so loopback there."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"{self.scheme}://{host}:{self.port}"

    async def close(self) -> None:
        """Stop accepting, let answers end for a moment, close everything."""
        if self._reaper is not None:
            self._reaper.cancel()
        await self._runner.cleanup()


async def listen(
    app: web.Application,
    host: str,
    port: int,
    access: Access | None,
    *,
    tls: ssl.SSLContext | None = None,
    shutdown_seconds: float = _SHUTDOWN_SECONDS,
    silent_seconds: float = _SILENT_SECONDS,
) -> Listener:
    """Serve `app` at `host:port` (0: a free port) and let `access` accept that address. Raises `ConfigError` where it cannot be bound.

    `access` None: who may call is checked by other means than Host and key, as on the mesh listener by certificates.
    """
    allow_open_files(_OPEN_FILES)
    server_socket = bind(host, port)
    bound_host, bound_port = server_socket.getsockname()[:2]
    if access is not None:
        access.allow_address(host, bound_port)
        access.allow_address(bound_host, bound_port)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        # `Access` refuses packed bodies; aiohttp must not unpack, while it lets a refused one run out, what nobody will read.
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=_KEEPALIVE_SECONDS,
        lingering_time=_LINGERING_SECONDS,
        shutdown_timeout=shutdown_seconds,
        handle_signals=False,
    )
    try:
        await runner.setup()
        await web.SockSite(runner, server_socket, backlog=_BACKLOG, ssl_context=tls).start()
    except BaseException:
        server_socket.close()
        await runner.cleanup()
        raise
    reaper = asyncio.create_task(_close_silent(runner, silent_seconds), name="silent connections")
    return Listener(bound_host, bound_port, runner, reaper, "http" if tls is None else "https")


async def _close_silent(runner: web.AppRunner, seconds: float) -> None:
    """Close connections that sent no whole request head between one look and the next."""
    waiting: set[object] = set()
    while True:
        await asyncio.sleep(seconds)
        server = runner.server
        # aiohttp bounds the time between two requests, not that before the first, and keeps the count to itself.
        silent = [one for one in server.connections if not getattr(one, "_request_count", 1)] if server else []
        for connection in silent:
            if connection in waiting:
                connection.force_close()
        waiting = set(silent)


def allow_open_files(wanted: int) -> None:
    """Raise this process's soft limit of open files to `wanted`, or to what the system allows."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS shows more than it gives
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening. Raises `ConfigError` that says who to ask: a busy port, a foreign address, a low port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ConfigError(
            f"Cannot listen on {host}: this machine knows no such name. Set node.listen (or --listen) to one of its own addresses, "
            "such as 127.0.0.1:8000."
        ) from None
    server_socket = socket.socket(family, kind, protocol)
    try:
        # A node that restarts must not wait a minute for its own old connections to be forgotten.
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind(address)
        server_socket.setblocking(False)
    except OSError as fault:
        server_socket.close()
        raise ConfigError(_why_not(fault.errno, host, port)) from None
    return server_socket


def _why_not(number: int | None, host: str, port: int) -> str:
    if number == errno.EADDRINUSE:
        return (
            f"Cannot listen on {host}:{port}: another program already does. Stop it, or choose another port, such as "
            f"--listen {host}:{port + 1 if port < 65535 else port - 1} (or --listen {host}:0 for any free one)."
        )
    if number == errno.EACCES:
        return f"Cannot listen on {host}:{port}: ports below 1024 need privileges. Choose a higher one, such as --listen {host}:8000."
    if number == errno.EADDRNOTAVAIL:
        return f"Cannot listen on {host}:{port}: this machine has no such address. Set --listen to one that it has, or to 127.0.0.1:8000."
    return f"Cannot listen on {host}:{port}: the system refused it ({errno.errorcode.get(number or 0, 'unknown')}). Choose another address."
