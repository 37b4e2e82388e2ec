"""Model files over HTTP: ranges of what is held, by hash; nothing else, however it is asked for."""

from __future__ import annotations

import hashlib
import os

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from tars.mesh import folder_manifest
from tars.mesh.file_server import FileServer
from tars.mesh.held_files import SharedFile
from tars.model_files import Fingerprint
from tars.rpc import file_routes
from tars.rpc.file_routes import add_file_routes

CONTENT = bytes(range(256)) * 20


def print_of(path):
    found = path.stat()
    return Fingerprint(found.st_size, found.st_mtime_ns)


def share_file(path):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {sha256: SharedFile(path, path.stat().st_size, {"": print_of(path)})}, sha256


def share_folder(path):
    manifest = folder_manifest.made(path, lambda each: hashlib.sha256(each.read_bytes()).hexdigest())
    prints = {each.path: print_of(path / each.path) for each in manifest.files}
    return {manifest.sha256: SharedFile(path, 1, prints, manifest)}, manifest.sha256


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
async def serve(aiohttp_server):
    async def start(shared, **options):
        server = FileServer(shared.get, **options)
        application = web.Application()
        add_file_routes(application, server)
        return server, (await aiohttp_server(application)).make_url("/files")

    return start


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as one:
        yield one


async def test_the_whole_file_and_its_size(serve, session, file):
    shared, sha256 = share_file(file)
    _, url = await serve(shared)
    async with session.get(url / sha256) as answer:
        assert answer.status == 200
        assert await answer.read() == CONTENT
        assert answer.headers["ETag"] == f'"{sha256}"'
        assert answer.headers["Accept-Ranges"] == "bytes"
    async with session.head(url / sha256) as answer:
        assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(CONTENT)))
        assert await answer.read() == b""


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=100-199", (100, 200)),
        ("bytes=5000-", (5000, 5120)),
        ("bytes=5000-99999", (5000, 5120)),
        ("bytes=-20", (5100, 5120)),
        ("bytes=-99999", (0, 5120)),
    ],
)
async def test_a_range(serve, session, file, asked, given):
    shared, sha256 = share_file(file)
    _, url = await serve(shared)
    async with session.get(url / sha256, headers={"Range": asked}) as answer:
        assert answer.status == 206
        assert await answer.read() == CONTENT[slice(*given)]
        assert answer.headers["Content-Range"] == f"bytes {given[0]}-{given[1] - 1}/5120"


@pytest.mark.parametrize(
    "asked",
    ["bytes=5120-", "bytes=9-3", "bytes=-0", "bytes=-", "bytes=a-b", "bytes=0-1,3-4", "lines=1-2", "bytes=٣-٤", ""],
)
async def test_a_range_that_cannot_be_given_is_416(serve, session, file, asked):
    shared, sha256 = share_file(file)
    _, url = await serve(shared)
    async with session.get(url / sha256, headers={"Range": asked}) as answer:
        assert answer.status == 416
        assert answer.headers["Content-Range"] == "bytes */5120"


async def test_an_empty_file_has_no_range(serve, session, tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    shared, sha256 = share_file(path)
    _, url = await serve(shared)
    async with session.get(url / sha256) as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with session.get(url / sha256, headers={"Range": "bytes=0-0"}) as answer:
        assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */0")


@pytest.mark.parametrize(
    "path",
    [
        "0" * 64,
        "model.gguf",
        "../model.gguf",
        "%2e%2e/model.gguf",
        "A" * 64,
        "0" * 63,
        f"{'0' * 64}/../../etc/passwd",
        "",
    ],
)
async def test_nothing_but_a_held_hash_is_found(serve, session, file, path):
    shared, _ = share_file(file)
    _, url = await serve(shared)
    async with session.get(URL(f"{url}/{path}", encoded=True)) as answer:
        assert answer.status == 404
        assert str(file) not in await answer.text()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "embedder"
    (path / "1_Pooling").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "1_Pooling" / "config.json").write_text('{"mode": "mean"}')
    (path / "secret.py").write_text("no part of the model")
    (tmp_path / "outside.json").write_text("another file of this PC")
    return path


async def test_a_folder_is_its_manifest_and_the_files_in_it(serve, session, folder):
    shared, sha256 = share_folder(folder)
    _, url = await serve(shared)
    async with session.get(url / sha256) as answer:
        manifest = folder_manifest.parse(await answer.read())
    assert manifest.sha256 == sha256
    assert [each.path for each in manifest.files] == ["1_Pooling/config.json", "config.json"]
    async with session.get(url / sha256 / "1_Pooling" / "config.json") as answer:
        assert await answer.text() == '{"mode": "mean"}'


@pytest.mark.parametrize(
    "path",
    [
        "secret.py",
        "..%2foutside.json",
        "../outside.json",
        "1_Pooling",
        "1_Pooling/",
        "1_Pooling/../config.json",
        "%00",
        "/etc/passwd",
    ],
)
async def test_nothing_but_the_manifests_files_is_found_in_a_folder(serve, session, folder, path):
    shared, sha256 = share_folder(folder)
    _, url = await serve(shared)
    async with session.get(URL(f"{url}/{sha256}/{path}", encoded=True)) as answer:
        assert answer.status == 404 or (path == "1_Pooling/../config.json" and answer.status == 200)
        assert "another file" not in await answer.text()


async def test_a_file_that_became_a_link_is_not_followed(serve, session, folder):
    shared, sha256 = share_folder(folder)
    _, url = await serve(shared)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent / "outside.json")
    async with session.get(url / sha256 / "config.json") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("change", ["changed", "removed", "a folder"])
async def test_a_file_that_is_not_as_it_was_is_not_given(serve, session, file, change):
    shared, sha256 = share_file(file)
    _, url = await serve(shared)
    if change == "changed":
        file.write_bytes(CONTENT[::-1])
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    if change == "a folder":
        file.mkdir()
    async with session.get(url / sha256) as answer:
        assert answer.status == 404


async def test_a_file_that_shrinks_while_it_is_sent_breaks_the_answer_off(serve, session, file, monkeypatch):
    monkeypatch.setattr("tars.mesh.file_server.CHUNK", 1024)
    shared, sha256 = share_file(file)
    server, url = await serve(shared, most_bytes_per_second=20_000.0)
    server._outgoing.burst = 1024.0
    async with session.get(url / sha256) as answer:
        assert len(await answer.content.readexactly(1024)) == 1024
        os.truncate(file, 2000)
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    assert server.sending == 0


async def test_more_than_so_many_at_once_are_told_to_ask_again(serve, session, file, monkeypatch):
    monkeypatch.setattr("tars.mesh.file_server.CHUNK", 1024)
    shared, sha256 = share_file(file)
    server, url = await serve(shared, most_at_once=1, most_bytes_per_second=20_000.0)
    server._outgoing.burst = 1024.0
    async with session.get(url / sha256) as first:
        await first.content.readexactly(1)
        async with session.get(url / sha256) as second:
            assert (second.status, second.headers["Retry-After"]) == (503, str(file_routes.RETRY_SECONDS))
        await first.read()
    async with session.get(url / sha256) as third:
        assert third.status == 200


async def test_no_other_method_is_answered(serve, session, file):
    shared, sha256 = share_file(file)
    _, url = await serve(shared)
    for method in ("PUT", "POST", "DELETE"):
        async with session.request(method, url / sha256) as answer:
            assert answer.status == 405
