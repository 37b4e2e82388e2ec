"""Binding an address: what cannot be bound says why and what to do."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import pytest

from tars.errors import ConfigError
from tars.rpc.listener import Listener, bind

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
