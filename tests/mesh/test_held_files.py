"""What a node says that it holds: hashed in the background, known only while the file is as it was."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading

import pytest
from model_stores import NAME, digest, write_embedder

from tars.catalogue import Catalogue
from tars.mesh import held_files
from tars.mesh.held_files import LOWEST_PRIORITY, HeldFiles, in_quiet_thread
from tars.model_files import FileHashes
from tars.state_folder import StateFolder


@pytest.fixture
def hashes(tmp_path):
    (tmp_path / "state").mkdir()
    return FileHashes(StateFolder(tmp_path / "state"))


@pytest.fixture
def file(tmp_path, tiny_gguf):
    return shutil.copy(tiny_gguf, tmp_path / "own.gguf")


@pytest.fixture
def catalogue(file):
    catalogue = Catalogue.load(builtin=False)
    catalogue.add_file(file, NAME)
    return catalogue


async def test_a_file_is_told_at_once_and_its_hash_when_it_is_known(catalogue, hashes, file, monkeypatch):
    told = []
    held = HeldFiles(catalogue, hashes, lambda: told.append(held.held()))
    assert held.held() == []
    await held.scan()
    first, last = told
    assert [(each.model, each.variant, each.sha256) for each in first] == [(NAME, "Q8_0", None)]
    assert [(each.sha256, each.size, each.folder) for each in last] == [(digest(file), file.stat().st_size, False)]
    shared = held.shared(digest(file))
    assert (shared.path, shared.manifest) == (file, None)
    assert held.shared("0" * 64) is None


async def test_what_is_unchanged_is_neither_hashed_nor_told_again(catalogue, hashes, file, monkeypatch):
    told = []
    held = HeldFiles(catalogue, hashes, lambda: told.append(1))
    await held.scan()
    told.clear()
    monkeypatch.setattr(FileHashes, "sha256", lambda *_: pytest.fail("hashed again"))
    await held.scan()
    assert told == []
    assert held.scans == 2


async def test_a_changed_file_has_another_hash_and_the_old_one_is_forgotten(catalogue, hashes, file):
    held = HeldFiles(catalogue, hashes)
    await held.scan()
    before = digest(file)
    with open(file, "ab") as end:  # noqa: ASYNC230  # a few bytes
        end.write(b"more")
    await held.scan()
    assert held.shared(before) is None
    assert held.held()[0].sha256 == digest(file) != before


async def test_a_removed_file_is_held_no_longer(catalogue, hashes, file):
    held = HeldFiles(catalogue, hashes)
    await held.scan()
    file.unlink()
    await held.scan()
    assert held.held() == []


async def test_a_folder_is_held_by_the_hash_of_its_list(hashes, tmp_path):
    catalogue = Catalogue.load(builtin=False)
    folder = write_embedder(tmp_path / "embedder")
    catalogue.add_file(folder, NAME)
    held = HeldFiles(catalogue, hashes)
    await held.scan()
    (row,) = held.held()
    shared = held.shared(row.sha256)
    assert row.folder
    assert shared.manifest.sha256 == row.sha256
    assert set(shared.prints) == {"1_Pooling/config.json", "config.json", "model.safetensors"}
    assert row.size == sum((folder / path).stat().st_size for path in shared.prints)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    await held.scan()
    assert held.held()[0].sha256 != row.sha256


async def test_a_file_that_cannot_be_hashed_is_said_once_and_holds_up_no_other(
    catalogue, hashes, file, tmp_path, caplog, monkeypatch
):
    other = shutil.copytree(write_embedder(tmp_path / "embedder"), tmp_path / "other")
    catalogue.add_file(other, "aaa")
    real = FileHashes.sha256

    def sha256(self, path, progress=lambda percent: None):
        if path.parent == other:
            raise OSError(5, "Input/output error")
        return real(self, path, progress)

    monkeypatch.setattr(FileHashes, "sha256", sha256)
    held = HeldFiles(catalogue, hashes)
    await held.scan()
    await held.scan()
    assert [each.sha256 for each in held.held()] == [None, digest(file)]
    assert caplog.text.count("cannot be given to peers") == 1


async def test_it_looks_again_when_it_is_told_to(catalogue, hashes, file, tmp_path):
    held = HeldFiles(catalogue, hashes)
    running = asyncio.create_task(held.run())
    async with asyncio.timeout(20):
        while held.scans < 1:  # noqa: ASYNC110  # it counts, and has no event
            await asyncio.sleep(0.001)
        held.look_again()
        while held.scans < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait({running})


async def test_stopping_ends_a_hashing_that_is_under_way(catalogue, hashes, monkeypatch):
    monkeypatch.setattr("tars.model_files.HASH_CHUNK", 1000)
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    real = FileHashes.sha256

    def sha256(self, path, progress):
        def slowed(percent):
            began.set()
            go_on.wait(20)
            progress(percent)

        try:
            return real(self, path, slowed)
        except held_files.Stopped:
            ended.set()
            raise

    monkeypatch.setattr(FileHashes, "sha256", sha256)
    running = asyncio.create_task(HeldFiles(catalogue, hashes).run())
    assert await asyncio.to_thread(began.wait, 20)
    running.cancel()
    await asyncio.wait({running})
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 20)


async def test_a_quiet_thread_yields_to_everything_else_and_brings_errors_back():
    priority = await in_quiet_thread(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert priority == LOWEST_PRIORITY
    assert os.getpriority(os.PRIO_PROCESS, 0) < LOWEST_PRIORITY

    def fails():
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        await in_quiet_thread(fails)
