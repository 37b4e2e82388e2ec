"""How a listen address is written."""

from __future__ import annotations

import pytest

from tars.config_schema.listen_address import ListenAddress


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000, True),
        ("127.8.9.1:0", "127.8.9.1", 0, True),
        ("localhost:65535", "localhost", 65535, True),
        ("[::1]:8000", "::1", 8000, True),
        ("[::]:8000", "::", 8000, False),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, False),
        ("0.0.0.0:8000", "0.0.0.0", 8000, False),
        ("192.168.1.5:8000", "192.168.1.5", 8000, False),
        ("pc1.tail.net:8000", "pc1.tail.net", 8000, False),
        ("localhost.example.org:1", "localhost.example.org", 1, False),
    ],
)
def test_a_listen_address_is_read_and_written_back(text: str, host: str, port: int, loopback: bool) -> None:
    address = ListenAddress.parse(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, loopback)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "8000",
        ":8000",
        "127.0.0.1",
        "127.0.0.1:",
        "a:b",
        "a:65536",
        "a:-1",
        "a:٣",
        "::1:8000",
        "[nonsense]:1",
        "http://a:1",
        "a b:1",
        "[::1:1",
    ],
)
def test_a_wrong_listen_address_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:8000|\[::1\]:8000"):
        ListenAddress.parse(text)
