"""Binding an address: what cannot be bound says why and what to do."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from tars.errors import ConfigError
from tars.rpc.access import Access
from tars.rpc.listener import Listener, allow_open_files, bind, listen
from tars.rpc.options import AccessOptions

Serve = Callable[..., Awaitable[Listener]]


async def test_port_0_is_any_free_port_and_the_url_says_which(serve: Serve) -> None:
    listener = await serve()
    assert listener.port != 0
    assert listener.url == f"http://127.0.0.1:{listener.port}"


async def test_nothing_listens_after_close(serve: Serve) -> None:
    listener = await serve()
    await listener.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", listener.port)) != 0
    bind("127.0.0.1", listener.port).close()


def test_a_busy_port_names_another_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*another program.*--listen 127.0.0.1:0"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "word"), [("192.0.2.1", "no such address"), ("no-such-name.invalid", "no such name")])
def test_an_address_that_is_not_this_machines_says_so(host: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        bind(host, 0)


def test_the_url_of_an_ipv6_address_has_brackets() -> None:
    assert Listener("::1", 8000, None).url == "http://[::1]:8000"  # type: ignore[arg-type]  # no server is asked


@pytest.mark.parametrize(("every", "this_pc"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_the_url_of_all_addresses_is_one_that_can_be_gone_to(every: str, this_pc: str) -> None:
    assert Listener(every, 8000, None).url == f"http://{this_pc}:8000"  # type: ignore[arg-type]  # no server is asked


@pytest.mark.slow
async def test_a_connection_that_never_asks_is_closed_and_one_that_asked_stays() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/", answer)
    listener = await listen(app, "127.0.0.1", 0, Access(AccessOptions()), silent_seconds=0.3)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            assert await (await session.get(listener.url)).text() == "here"
            kept = session.connector._conns  # type: ignore[union-attr]  # the client's own idea of what is open
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: slow")
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            assert len(kept) == 1
            assert await (await session.get(listener.url)).text() == "here"
    finally:
        await listener.close()


def test_the_limit_of_open_files_is_raised_as_far_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
        allow_open_files(600)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
