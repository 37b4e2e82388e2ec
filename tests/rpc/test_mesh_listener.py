"""The mesh listener over real TLS: members, strangers, and those who are members no longer."""

from __future__ import annotations

import asyncio
import datetime as dates
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from mesh_bench import MeshNode, certified, new_id, running_mesh
from raw_server import sockets_closed

from tars.core.records import Member
from tars.errors import NotAMember, PeerUnreachable
from tars.mesh.certificates import PeerCertificate
from tars.mesh.identity import Identity
from tars.rpc.http_client import RpcConnection
from tars.rpc.mesh_listener import CA_PATH, HINT_PATH, STRANGER_BODY_BYTES, add_mesh_hint


@pytest.fixture(autouse=True)
async def no_socket_is_left() -> AsyncIterator[None]:
    yield
    await sockets_closed()


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[list[MeshNode]]:
    async with running_mesh(tmp_path, "one", "two") as nodes:
        yield nodes


def trust_all(peer: PeerCertificate) -> None:
    """Judges nobody."""


def connection(node: MeshNode, identity: Identity) -> RpcConnection:
    return RpcConnection(f"https://{node.address}", tls=identity.client_context(trust_all), timeout=10)


def remove(node: MeshNode, other: MeshNode) -> None:
    member = node.store.map.get(f"member/{other.id}")
    assert isinstance(member, Member)
    node.store.put(f"member/{other.id}", replace(member, removed=True))


def nobody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def as_stranger(node: MeshNode, method: str, path: str, **options: Any) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"https://{node.address}{path}", ssl=nobody(), **options) as response,
    ):
        return response.status, await response.read()


async def test_a_member_is_answered_and_known_by_its_certificate(mesh: list[MeshNode]) -> None:
    one, two = mesh
    async with connection(one, two.identity) as peer:
        assert (await peer.call("node.ping"))["node"] == one.id
        await peer.call("inference.tokenize", {"text": "a"})
    context = one.node.contexts[0]
    assert (context.caller, context.peer) == ("mesh", two.id)


async def test_a_removed_node_is_told_so_and_what_to_do(mesh: list[MeshNode]) -> None:
    one, two = mesh
    async with connection(one, two.identity) as peer:
        await peer.call("node.ping")
        remove(one, two)
        with pytest.raises(NotAMember, match=r"removed from the mesh; join again with a new token"):
            await peer.call("node.ping")
    async with connection(one, two.identity) as again:
        with pytest.raises(NotAMember, match="removed"):
            await again.call("node.ping")
    assert one.node.started == ["node.ping"]


async def test_a_removed_nodes_open_connections_are_closed_at_once_and_others_stay(
    mesh: list[MeshNode], tmp_path: Path
) -> None:
    one, two = mesh
    three = certified(one.identity, tmp_path / "three")
    one.store.put(f"member/{three.node}", three.member("three"))
    one.node.gate = asyncio.Event()
    async with connection(one, two.identity) as removed, connection(one, three) as kept, asyncio.timeout(10):
        await kept.call("node.ping")
        call = asyncio.create_task(removed.call("inference.embed", {"input": ["a"]}))
        await one.node.waiting.wait()
        remove(one, two)
        assert one.listener.members_changed(["node/x"]) == 0
        assert one.listener.members_changed([f"member/{two.id}"]) == 1
        with pytest.raises(PeerUnreachable):
            await call
        # The work stops too.
        await one.node.closed.wait()
        assert (await kept.call("node.ping"))["node"] == one.id


async def test_a_certificate_of_the_ca_is_not_enough(mesh: list[MeshNode], tmp_path: Path) -> None:
    one, two = mesh
    # Whoever was a member has the CA's key, and can sign what it likes.
    minted = certified(two.identity, tmp_path / "minted")
    async with connection(one, minted) as peer:
        with pytest.raises(NotAMember, match="not known as a member"):
            await peer.call("node.ping")
    in_anothers_name = certified(two.identity, tmp_path / "name", two.id)
    async with connection(one, in_anothers_name) as peer:
        with pytest.raises(NotAMember, match="under another key"):
            await peer.call("node.ping")
    assert one.node.started == []


async def test_certificates_of_another_mesh_expired_ones_and_self_signed_ones_reach_nothing(
    mesh: list[MeshNode], tmp_path: Path
) -> None:
    one = mesh[0]
    (tmp_path / "mesh2").mkdir()
    stranger = Identity.create(tmp_path / "mesh2", one.id)
    async with connection(one, stranger) as peer:
        with pytest.raises(NotAMember, match=r"no node of this mesh.*Nothing was sent"):
            await peer.call("node.ping")
    # The same, shown by somebody who does not mind who answers.
    blind = stranger.client_context(trust_all)
    blind.verify_mode = ssl.CERT_NONE
    old = mesh[1].identity
    old.renew_if_due(dates.datetime.now(dates.UTC) - dates.timedelta(days=800))
    for context in (blind, old.client_context(trust_all)):
        async with RpcConnection(f"https://{one.address}", tls=context, timeout=10) as peer:
            with pytest.raises((NotAMember, PeerUnreachable)):
                await peer.call("node.ping")
    assert one.node.started == []


async def test_without_a_certificate_there_is_the_cas_certificate_and_nothing_else(mesh: list[MeshNode]) -> None:
    one = mesh[0]
    assert await as_stranger(one, "GET", CA_PATH) == (200, one.identity.ca_certificate_pem)
    for method, path in (("GET", "/rpc"), ("GET", "/"), ("GET", "/files/00"), ("PUT", CA_PATH), ("GET", "/health")):
        status, body = await as_stranger(one, method, path)
        assert status == 403, (method, path)
        assert b"not_a_member" in body


@pytest.mark.parametrize(
    "method",
    ["node.ping", "node.describe", "mesh.gossip", "mesh.key_new", "mesh.remove", "inference.chat", "rpc.discover"],
)
async def test_without_a_certificate_no_method_but_join_is_run(mesh: list[MeshNode], method: str) -> None:
    one = mesh[0]
    status, body = await as_stranger(one, "POST", "/rpc", json={"jsonrpc": "2.0", "method": method, "id": 1})
    assert status == 200
    assert b"not_a_member" in body
    batch = [{"jsonrpc": "2.0", "method": method, "id": 1}] * 3
    assert (await as_stranger(one, "POST", "/rpc", json=batch))[1].count(b"not_a_member") == 3
    assert one.node.started == []


async def test_a_peer_administers_nothing(mesh: list[MeshNode]) -> None:
    one, two = mesh
    async with connection(one, two.identity) as peer:
        for method, params in (
            ("mesh.key_new", {"name": "x", "admin": True}),
            ("mesh.token_new", {}),
            ("mesh.join", {}),
        ):
            with pytest.raises(Exception, match="nothing was run"):
                await peer.call(method, params)
    assert one.keys.listed() == ((), [])


async def test_a_stranger_may_not_send_megabytes_nor_hide_how_many(mesh: list[MeshNode]) -> None:
    one = mesh[0]
    large = b" " * (STRANGER_BODY_BYTES + 1)
    headers = {"Content-Type": "application/json"}
    status, body = await as_stranger(one, "POST", "/rpc", data=large, headers=headers)
    assert (status, b"limit_exceeded" in body) == (413, True)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"{}"

    status, body = await as_stranger(one, "POST", "/rpc", data=pieces(), headers=headers)
    assert (status, b"Content-Length" in body) == (400, True)
    status, body = await as_stranger(one, "POST", "/rpc", data=b"{}", headers={"Content-Type": "text/plain"})
    assert status == 415


async def test_added_routes_are_behind_the_same_checks(tmp_path: Path) -> None:
    async def files(request: web.Request) -> web.Response:
        return web.Response(text="a file")

    async with running_mesh(tmp_path, "one", "two") as nodes:
        one, two = nodes
        other = MeshNode(tmp_path / "one", "one", one.identity)
        other.knows(one, two)
        other.listener.app.router.add_get("/files/{hash}", files)
        await other.listener.start("127.0.0.1", 0)
        try:
            async with (
                connection(other, two.identity) as peer,
                peer.get("/files/abc", {"Range": "bytes=0-"}) as response,
            ):
                assert (response.status, await response.text()) == (200, "a file")
            assert (await as_stranger(other, "GET", "/files/abc"))[0] == 403
            remove(other, two)
            async with connection(other, two.identity) as peer, peer.get("/files/abc") as response:
                assert response.status == 403
        finally:
            await other.listener.close()


async def test_plain_http_and_noise_do_no_harm(mesh: list[MeshNode]) -> None:
    one, two = mesh
    for noise in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" + bytes(300), b"\x00" * 1000, b""):
        with socket.create_connection(("127.0.0.1", one.listener.port), timeout=5) as raw:
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
            await asyncio.to_thread(_drained, raw)
    async with connection(one, two.identity) as peer:
        assert (await peer.call("node.ping"))["node"] == one.id


def _drained(raw: socket.socket) -> None:
    try:
        while raw.recv(4096):
            pass
    except ConnectionError:
        pass


async def test_the_clients_port_says_which_is_the_meshs(mesh: list[MeshNode]) -> None:
    port: int | None = mesh[0].listener.port
    app = web.Application()
    add_mesh_hint(app, lambda: port)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}{HINT_PATH}"
        async with aiohttp.ClientSession() as session:
            assert await (await session.get(url)).json() == {"mesh_port": port}
            port = None
            assert await (await session.get(url)).json() == {"mesh_port": None}
    finally:
        await runner.cleanup()


async def test_closing_twice_is_once(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, "one") as (one,):
        await one.listener.close()
        await one.listener.close()
    assert new_id() != new_id()
