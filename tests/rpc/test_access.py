"""Who may call: exact hosts and origins, API keys, JSON only; on every route."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import psutil
import pytest
from aiohttp import web
from fake_node import FakeNode
from multidict import CIMultiDict, CIMultiDictProxy

from tars.core.types import NodeId
from tars.errors import Forbidden, Unauthorized, UnsupportedMediaType
from tars.mesh.client_keys import ClientKeys
from tars.mesh.replicated_store import MemoryStore
from tars.rpc.access import LOCAL_CALLER, Access, Caller, access_middleware
from tars.rpc.http_server import add_rpc_routes, refusal_renderer
from tars.rpc.listener import Listener, listen
from tars.rpc.method_table import METHODS, Role
from tars.rpc.options import AccessOptions, RpcOptions

Serve = Callable[..., Awaitable[Listener]]
KEY = "correct-horse-battery"


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


def loopback(**options: object) -> Access:
    access = Access(AccessOptions(**options))  # type: ignore[arg-type]  # keywords of the dataclass
    access.allow_address("127.0.0.1", 8000)
    return access


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000"])
def test_on_loopback_all_its_names_are_served(host: str) -> None:
    assert loopback().check("GET", headers(("Host", host))) == LOCAL_CALLER


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:8001",
        "localhost",
        "evil.example:8000",
        "localhost.evil.example:8000",
        "127.0.0.1:8000.evil.example",
        "127.0.0.1:8000, evil.example",
        "127.0.0.2:8000",
        "0.0.0.0:8000",
        "2130706433:8000",
        "[::ffff:127.0.0.1]:8000",
        " 127.0.0.1:8000",
    ],
)
def test_any_other_host_is_refused(host: str) -> None:
    with pytest.raises(Forbidden):
        loopback().check("GET", headers(("Host", host)))


@pytest.mark.parametrize("pairs", [(), (("Host", "127.0.0.1:8000"), ("Host", "127.0.0.1:8000"))])
def test_there_must_be_exactly_one_host_header(pairs: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(Forbidden):
        loopback().check("GET", headers(*pairs))


def test_a_configured_host_is_served_with_and_without_the_port() -> None:
    access = loopback(allowed_hosts=("Box.tailnet.ts.net", "proxy.example:443", "[fe80::1]", "[fe80::2]:1"))
    served = ("box.tailnet.ts.net", "box.tailnet.ts.net:8000", "proxy.example:443", "[fe80::1]:8000", "[fe80::2]:1")
    for host in served:
        access.check("GET", headers(("Host", host)))
    for host in ("box.tailnet.ts.net:9", "proxy.example", "proxy.example:443:8000", "[fe80::2]:8000"):
        with pytest.raises(Forbidden):
            access.check("GET", headers(("Host", host)))


def test_port_80_need_not_be_written() -> None:
    access = Access(AccessOptions())
    access.allow_address("127.0.0.1", 80)
    access.check("GET", headers(("Host", "localhost")))


def test_bound_to_one_address_only_that_one_is_served() -> None:
    access = Access(AccessOptions())
    access.allow_address("192.0.2.7", 8000)
    access.check("GET", headers(("Host", "192.0.2.7:8000")))
    with pytest.raises(Forbidden):
        access.check("GET", headers(("Host", "localhost:8000")))


def test_bound_to_every_address_each_of_this_machine_is_served_and_no_name() -> None:
    access = Access(AccessOptions())
    access.allow_address("0.0.0.0", 8000)  # nothing is bound here
    own = [one.address for entries in psutil.net_if_addrs().values() for one in entries if one.family.name == "AF_INET"]
    for address in [*own, "localhost"]:
        access.check("GET", headers(("Host", f"{address}:8000")))
    for host in ("192.0.2.77:8000", "0.0.0.0:8000", "evil.example:8000"):
        with pytest.raises(Forbidden):
            access.check("GET", headers(("Host", host)))


HOST = ("Host", "127.0.0.1:8000")


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "http://localhost:8000", "https://chat.example"])
def test_the_nodes_own_pages_and_configured_origins_may_call(origin: str) -> None:
    loopback(allowed_origins=("https://chat.example/",)).check("GET", headers(HOST, ("Origin", origin)))


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "*",
        "http://evil.example",
        "https://127.0.0.1:8000",
        "http://127.0.0.1",
        "http://127.0.0.1:8001",
        "http://127.0.0.1:8000.evil.example",
        "https://chat.example.evil",
        "https://evil-chat.example",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_any_other_origin_is_refused_whatever_the_method(origin: str, method: str) -> None:
    with pytest.raises(Forbidden):
        loopback(allowed_origins=("https://chat.example",)).check(method, headers(HOST, ("Origin", origin)))


def test_two_origins_are_refused_even_if_one_is_right() -> None:
    own = ("Origin", "http://127.0.0.1:8000")
    with pytest.raises(Forbidden):
        loopback().check("GET", headers(HOST, own, own))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_what_may_change_something_must_be_json(method: str) -> None:
    loopback().check(method, headers(HOST, ("Content-Type", "application/json")))
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json; charset=utf-16"):
        with pytest.raises(UnsupportedMediaType):
            loopback().check(method, headers(HOST, ("Content-Type", kind)))
    with pytest.raises(UnsupportedMediaType):
        loopback().check(method, headers(HOST))


def test_the_caller_is_named_after_the_key() -> None:
    access = loopback(api_keys={"laptop": KEY, "ci": "another-key-of-16"})
    assert access.check("GET", headers(HOST, ("Authorization", f"Bearer {KEY}"))).name == "laptop"
    assert access.check("GET", headers(HOST, ("Authorization", "bearer  another-key-of-16"))).name == "ci"


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer \udce4",
    ],
)
def test_no_key_or_a_wrong_one_is_refused_without_a_word_about_the_right_one(authorization: str | None) -> None:
    given = [] if authorization is None else [("Authorization", authorization)]
    with pytest.raises(Unauthorized) as refused:
        loopback(api_keys={"laptop": KEY}).check("GET", headers(HOST, *given))
    assert KEY not in str(refused.value.to_json())
    assert "laptop" not in str(refused.value.to_json())


def bearer(key: str) -> CIMultiDictProxy[str]:
    return headers(HOST, ("Authorization", f"Bearer {key}"))


def test_what_a_key_allows() -> None:
    keys = ClientKeys(MemoryStore(NodeId("n1")), {"me": KEY})
    keys.accept_operator_key("operator-key-of-this-start")
    client, admin = keys.new("laptop"), keys.new("ops", admin=True)
    access = Access(AccessOptions(), keys)
    access.allow_address("127.0.0.1", 8000)
    for key, caller in (
        (client, Caller("laptop", Role.CLIENT)),
        (admin, Caller("ops", Role.ADMINISTRATOR)),
        (KEY, Caller("me", Role.ADMINISTRATOR)),
        ("operator-key-of-this-start", Caller("operator", Role.ADMINISTRATOR)),
    ):
        assert access.check("GET", bearer(key)) == caller


def test_a_key_of_the_mesh_works_as_soon_as_it_is_made_and_not_once_it_is_revoked() -> None:
    keys = ClientKeys(MemoryStore(NodeId("n1")))
    access = Access(AccessOptions(), keys)
    access.allow_address("127.0.0.1", 8000)
    assert access.check("GET", headers(HOST)) == LOCAL_CALLER
    key = keys.new("laptop")
    with pytest.raises(Unauthorized):
        access.check("GET", headers(HOST))
    assert access.check("GET", bearer(key)).name == "laptop"
    assert access.check("GET", headers(HOST), needs_key=False) == Caller("local", Role.CLIENT)
    keys.new("other")
    keys.revoke("laptop")
    with pytest.raises(Unauthorized):
        access.check("GET", bearer(key))


def test_where_others_can_reach_the_node_a_key_is_asked_for_though_there_is_none() -> None:
    keys = ClientKeys(MemoryStore(NodeId("n1")))
    keys.accept_operator_key("operator-key-of-this-start")
    access = Access(AccessOptions(), keys, open_without_keys=False)
    access.allow_address("127.0.0.1", 8000)
    for given in ((), (("Authorization", "Bearer "),), (("Authorization", "Bearer x"),)):
        with pytest.raises(Unauthorized, match="tars key new"):
            access.check("GET", headers(HOST, *given))
    assert access.check("GET", bearer("operator-key-of-this-start")).role is Role.ADMINISTRATOR
    # Also after the last key was revoked.
    keys.new("laptop")
    keys.revoke("laptop")
    with pytest.raises(Unauthorized):
        access.check("GET", headers(HOST))


async def test_a_clients_key_runs_what_clients_may_and_an_admins_the_rest(
    node: FakeNode, session: aiohttp.ClientSession
) -> None:
    keys = ClientKeys(MemoryStore(NodeId("n1")))
    tokens = {Role.CLIENT: keys.new("laptop"), Role.ADMINISTRATOR: keys.new("ops", admin=True)}
    options = RpcOptions()
    access = Access(options.access, keys, open_without_keys=False)
    app = web.Application()
    app.middlewares.append(access_middleware(access, refusal_renderer(add_rpc_routes(app, node, options))))
    listener = await listen(app, "127.0.0.1", 0, access, shutdown_seconds=1.0)
    try:
        for role, key in tokens.items():
            for method, spec in METHODS.items():
                call = {"jsonrpc": "2.0", "method": method, "id": 1}
                given = {"Authorization": f"Bearer {key}"}
                async with session.post(listener.url + "/rpc", json=call, headers=given) as response:
                    error = (await response.json()).get("error", {"data": {"kind": None}})
                assert (error["data"]["kind"] == "forbidden") is (role not in spec.roles), (role, method)
    finally:
        await listener.close()


async def test_every_route_is_behind_the_checks(serve: Serve, session: aiohttp.ClientSession) -> None:
    url = (await serve(RpcOptions(access=AccessOptions(api_keys={"laptop": KEY})), frozenset({"/health"}))).url
    right = {"Authorization": f"Bearer {KEY}"}
    for path in ("/rpc", "/health", "/nowhere"):
        for wrong in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            async with session.get(url + path, headers={**right, **wrong}) as response:
                assert response.status == 403
                assert (await response.json())["error"]["data"]["kind"] == "forbidden"
    for path, status in (("/rpc", 401), ("/nowhere", 401), ("/health", 200)):
        async with session.get(url + path) as response:
            assert response.status == status
            assert (response.headers.get("WWW-Authenticate") == "Bearer") is (status == 401)
    async with session.get(url + "/nowhere", headers=right) as response:
        assert response.status == 404


async def test_a_refusal_at_rpc_is_a_json_rpc_answer(serve: Serve, session: aiohttp.ClientSession) -> None:
    url = (await serve(RpcOptions(access=AccessOptions(api_keys={"laptop": KEY})))).url
    async with session.post(url + "/rpc", data=b"{}") as response:
        answer = await response.json()
    assert (answer["jsonrpc"], answer["id"], answer["error"]["code"]) == ("2.0", None, Unauthorized.code)


async def test_the_keys_holder_is_the_calls_caller(
    serve: Serve, session: aiohttp.ClientSession, node: FakeNode
) -> None:
    url = (await serve(RpcOptions(access=AccessOptions(api_keys={"laptop": KEY})))).url
    call = {"jsonrpc": "2.0", "method": "inference.tokenize", "id": 1, "params": {"text": "a"}}
    async with session.post(url + "/rpc", json=call, headers={"Authorization": f"Bearer {KEY}"}) as response:
        assert "result" in await response.json()
    assert node.contexts[0].caller == "laptop"


async def test_duplicate_host_headers_do_not_pass_the_server_either(serve: Serve, node: FakeNode) -> None:
    listener = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    body = b'{"jsonrpc":"2.0","method":"node.ping","id":1}'
    writer.write(
        b"POST /rpc HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nHost: evil.example\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (listener.port, len(body), body)
    )
    async with asyncio.timeout(5):
        status = int((await reader.read()).split(b" ")[1])
    assert status in (400, 403)
    assert node.started == []
    writer.close()
