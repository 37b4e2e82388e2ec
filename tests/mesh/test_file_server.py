"""What is given to peers: by hash, as it was hashed, so many at once, so fast. Its HTTP: tests/rpc/test_file_routes.py."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import aclosing

import pytest
from model_stores import NAME, digest, store_in, write_embedder

from tars.mesh.file_server import Busy, FileServer, Gone, NotShared


@pytest.fixture
async def store(tmp_path, tiny_gguf):
    one = store_in(tmp_path / "node", tiny_gguf)
    one._catalogue.add_file(write_embedder(tmp_path / "embedder"), "folder")
    await one.files.scan()
    return one


async def content(server, resource, start=0, stop=None):
    stop = resource.size if stop is None else stop
    async with aclosing(server.read(resource, start, stop)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_a_file_a_manifest_and_a_file_of_a_folder(store, tiny_gguf):
    server = FileServer(store.shared)
    resource = server.open(digest(tiny_gguf))
    assert await content(server, resource) == tiny_gguf.read_bytes()
    assert await content(server, resource, 5, 9) == tiny_gguf.read_bytes()[5:9]
    resource.close()
    resource.close()
    folder = next(each.sha256 for each in store.held() if each.folder)
    manifest = server.open(folder)
    assert await content(server, manifest) == store.shared(folder).manifest.text()
    inner = server.open(folder, "config.json")
    assert inner.etag == store.shared(folder).manifest.find("config.json").sha256
    inner.close()
    assert server.bytes_sent > 0


async def test_what_is_not_held_is_not_opened(store, tiny_gguf, tmp_path):
    server = FileServer(store.shared)
    folder = next(each.sha256 for each in store.held() if each.folder)
    for sha256, path in (
        ("0" * 64, ""),
        (digest(tiny_gguf), "config.json"),
        (folder, "evil.py"),
        (folder, "../embedder/config.json"),
        (folder, "1_Pooling"),
    ):
        with pytest.raises(NotShared):
            server.open(sha256, path)
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "embedder" / "config.json").write_text("changed")
    with pytest.raises(NotShared):
        server.open(folder, "config.json")
    assert len(os.listdir("/proc/self/fd")) == before


def test_so_many_at_once():
    server = FileServer({}.get, most_at_once=2)
    with server.place(), server.place():
        assert server.sending == 2
        with pytest.raises(Busy), server.place():
            pass
    assert server.sending == 0


async def test_no_faster_than_allowed(store, tiny_gguf, monkeypatch):
    monkeypatch.setattr("tars.mesh.file_server.CHUNK", 1000)
    server = FileServer(store.shared, most_bytes_per_second=40_000.0)
    server._outgoing.burst = 1000.0
    resource = server.open(digest(tiny_gguf))
    began = time.monotonic()
    await content(server, resource, 0, 9000)
    assert time.monotonic() - began > 0.16
    resource.close()


async def test_a_file_that_ends_early_is_no_whole_answer(tmp_path, tiny_gguf):

    own = shutil.copy(tiny_gguf, tmp_path / "own.gguf")
    store = store_in(tmp_path / "node", own)
    await store.files.scan()
    server = FileServer(store.shared)
    resource = server.open(digest(own))
    os.truncate(own, 10)
    with pytest.raises(Gone):
        await content(server, resource)
    resource.close()
    assert NAME in store._catalogue.entries
