"""Model files from node to node over the real mesh: mutual TLS, listener, routes, transfer; only what nodes know of each other is set."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import time
from dataclasses import replace
from functools import partial

import aiohttp
import pytest
from aiohttp import web
from mesh_bench import MeshNode, certified, new_id
from model_stores import NAME, digest, store_in, until, wanted, write_embedder

from tars.core.records import Member, NodeAdvert
from tars.core.types import NodeId, NodeSnapshot
from tars.errors import TransferFailed
from tars.mesh import model_fetch
from tars.mesh.file_server import FileServer
from tars.mesh.file_transfer import FileTransfer, SourceFailed
from tars.mesh.identity import Identity
from tars.rpc import peer_files
from tars.rpc.file_routes import add_file_routes
from tars.rpc.http_client import RpcConnection
from tars.rpc.peer_files import HttpPeerFiles


class FileNode:
    """A member with a store of model files, giving them on its mesh listener."""

    def __init__(self, mesh, store):
        self.mesh = mesh
        self.store = store
        self.server = FileServer(store.shared)
        add_file_routes(mesh.listener.app, self.server)

    def advert(self):
        entries = tuple(self.store._catalogue.entries.values())
        snapshot = NodeSnapshot(self.mesh.id, self.mesh.name)
        return NodeAdvert(snapshot, files=tuple(self.store.held()), models=entries)


@pytest.fixture
async def nodes(tmp_path, tiny_gguf):
    """`one` and `two` have the file, hashed; `three` has nothing."""
    made = []
    for name in ("one", "two", "three"):
        folder = tmp_path / name
        folder.mkdir()
        identity = certified(made[0].mesh.identity, folder) if made else Identity.create(folder, new_id())
        files = [tiny_gguf] if name != "three" else []
        made.append(FileNode(MeshNode(folder, name, identity), store_in(folder, *files)))
        await made[-1].mesh.listener.start("127.0.0.1", 0)
        await made[-1].store.files.scan()
    for node in made:
        others = [other for other in made if other is not node]
        node.mesh.knows(*(other.mesh for other in others))
        node.store.peers = HttpPeerFiles(
            lambda others=others: [other.advert() for other in others], node.mesh.peers.connection
        )
    yield made
    for node in made:
        await node.store.close()
        await node.mesh.peers.close()
        await node.mesh.listener.close()
        assert node.server.sending == 0


async def test_a_file_comes_from_two_members_and_is_whole(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(model_fetch, "FileTransfer", partial(FileTransfer, piece=20_000))
    one, two, three = nodes
    result = await three.store.pull(NAME)
    assert result.sources == ["one", "two"]
    path = three.store.path_of(*wanted(three.store))
    assert digest(path) == result.sha256 == one.store.held()[0].sha256
    # The last pieces may be fetched from both, by whoever is quicker.
    assert result.size_bytes <= one.server.bytes_sent + two.server.bytes_sent < 2 * result.size_bytes


async def test_a_folder_comes_over_the_wire(nodes, tmp_path):
    one, _, three = nodes
    one.store._catalogue.add_file(write_embedder(tmp_path / "embedder"), "folder")
    await one.store.files.scan()
    result = await three.store.pull("folder")
    assert result.sources == ["one"]
    await three.store.files.scan()
    assert [each for each in three.store.held() if each.folder] == [each for each in one.store.held() if each.folder]


async def test_a_member_whose_file_vanished_is_passed_over(nodes):
    one, _, three = nodes
    one.store.files._shared.clear()
    assert (await three.store.pull(NAME)).sources == ["two"]


async def test_a_member_that_is_not_there_any_more_is_passed_over(nodes):
    one, _, three = nodes
    await one.mesh.listener.close()
    assert (await three.store.pull(NAME)).sources == ["two"]


async def test_a_removed_member_gets_no_file(nodes):
    one, two, three = nodes
    for owner in (one, two):
        member = owner.mesh.store.map.get(f"member/{three.mesh.id}")
        assert isinstance(member, Member)
        owner.mesh.store.put(f"member/{three.mesh.id}", replace(member, removed=True))
        owner.mesh.listener.members_changed()
    with pytest.raises(TransferFailed, match="does not allow it"):
        await three.store.pull(NAME)
    assert one.server.bytes_sent == two.server.bytes_sent == 0


async def test_without_a_certificate_no_file_is_given(nodes):
    one, _, _ = nodes
    anybody = ssl.create_default_context()
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    async with aiohttp.ClientSession() as session:
        url = f"https://{one.mesh.address}/files/{one.store.held()[0].sha256}"
        async with session.get(url, ssl=anybody) as answer:
            assert answer.status == 403
            assert await answer.read() != b""
    assert one.server.bytes_sent == 0


async def test_a_size_is_the_whole_files(nodes, tiny_gguf):
    one, _, three = nodes
    sha256 = one.store.held()[0].sha256
    peers = three.store.peers
    assert await peers.size(one.mesh.id, sha256) == tiny_gguf.stat().st_size
    with pytest.raises(SourceFailed, match="does not have the file"):
        await peers.size(one.mesh.id, "0" * 64)
    with pytest.raises(SourceFailed, match="No address"):
        await peers.size(NodeId("nobody"), sha256)


async def test_a_model_that_only_a_peer_knows_is_found_by_name_and_alias(nodes):
    _, _, three = nodes
    assert three.store.peers.entry(NAME.upper()).name == NAME
    assert three.store.peers.entry("nothing") is None


# --- servers that do wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
async def against(aiohttp_server):
    """`await against(handler)`: peers that are one server with this handler."""
    connections = []

    async def start(handler):
        application = web.Application()
        application.router.add_get("/files/{rest:.*}", handler)
        connection = RpcConnection(str((await aiohttp_server(application)).make_url("/")))
        connections.append(connection)
        return HttpPeerFiles(list, lambda node: connection)

    yield start
    for connection in connections:
        await connection.close()


async def bytes_of(peers, start=0, stop=10, size=10):
    return b"".join([chunk async for chunk in peers.read(NodeId("n"), "a" * 64, start, stop, size)])


@pytest.mark.parametrize(
    ("status", "headers", "reason", "final"),
    [
        (206, {"Content-Range": "bytes 0-9/11"}, "another size", True),
        (206, {"Content-Range": "bytes 1-10/10"}, "another range", True),
        (206, {}, "another range", True),
        (206, {"Content-Range": "rubbish"}, "another range", True),
        (404, {}, "does not have the file", True),
        (403, {}, "does not allow", True),
        (416, {"Content-Range": "bytes */3"}, "another size", True),
        (500, {}, "answered 500", False),
        (302, {"Location": "http://elsewhere/"}, "answered 302", False),
    ],
)
async def test_an_answer_that_is_not_the_range_is_none(against, status, headers, reason, final):
    async def handler(request):
        return web.Response(status=status, headers=headers, body=b"0123456789")

    with pytest.raises(SourceFailed, match=reason) as raised:
        await bytes_of(await against(handler))
    assert raised.value.final is final


async def test_a_whole_file_in_answer_to_its_only_range_is_taken(against):
    async def handler(request):
        return web.Response(body=b"0123456789")

    peers = await against(handler)
    assert await bytes_of(peers) == b"0123456789"
    with pytest.raises(SourceFailed, match="does not answer ranges"):
        await bytes_of(peers, 0, 5)


@pytest.mark.parametrize(("header", "pause"), [("3", 3.0), ("soon", 5.0), ("", 5.0), ("99999", 5.0), ("0", 0.1)])
async def test_a_busy_peer_says_when_to_ask_again(against, header, pause):
    async def handler(request):
        return web.Response(status=503, headers={"Retry-After": header})

    with pytest.raises(SourceFailed) as raised:
        await bytes_of(await against(handler))
    assert raised.value.pause == pause


async def test_a_peer_that_breaks_off_is_worth_another_try(against):
    async def handler(request):
        response = web.StreamResponse(status=206, headers={"Content-Range": "bytes 0-9/10", "Content-Length": "10"})
        await response.prepare(request)
        await response.write(b"01234")
        request.transport.abort()
        return response

    with pytest.raises(SourceFailed, match="broke") as raised:
        await bytes_of(await against(handler))
    assert not raised.value.final


async def test_a_peer_that_never_begins_to_answer_is_given_up(against, monkeypatch):
    monkeypatch.setattr(peer_files, "ANSWER_SECONDS", 0.05)
    gone = asyncio.Event()

    async def handler(request):
        await gone.wait()
        return web.Response()

    began = time.monotonic()
    with pytest.raises(SourceFailed):
        await bytes_of(await against(handler))
    assert time.monotonic() - began < 5
    gone.set()


@pytest.mark.parametrize("told", ["", "bytes 0-0/99999999999999999", "bytes 0-0/*", "bytes 0-0/-1"])
async def test_a_size_that_is_none_is_not_believed(against, told):
    async def handler(request):
        return web.Response(status=206, headers={"Content-Range": told}, body=b"x")

    with pytest.raises(SourceFailed):
        await (await against(handler)).size(NodeId("n"), "a" * 64)


@pytest.mark.slow
async def test_how_quick_it_is(nodes, tmp_path):
    """Not a bound but a sign of life: 200 MB over mutual TLS on loopback."""
    one, _, three = nodes
    content = os.urandom(2**20) * 200
    big = tmp_path / "big.gguf"
    shutil.copy(one.store.path_of(*wanted(one.store)), big)
    with open(big, "ab") as file:  # noqa: ASYNC230  # a test's own file
        file.write(content)
    one.store._catalogue.add_file(big, "big")
    await one.store.files.scan()
    began = time.monotonic()
    result = await three.store.pull("big")
    seconds = time.monotonic() - began
    print(f"{result.size_bytes / seconds / 2**20:.0f} MiB/s")
    await until(lambda: one.server.sending == 0)
    assert seconds < 60
