"""A file of this PC is taken whole or not at all, and the original is never touched."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
from model_stores import digest, write_embedder

from tars.core.types import ModelKind
from tars.errors import BadModelFile, DiskFull, ModelFileMissing
from tars.mesh import local_copy
from tars.model_files import FileHashes
from tars.state_folder import StateFolder


@pytest.fixture
def hashes(tmp_path):
    (tmp_path / "state").mkdir()
    return FileHashes(StateFolder(tmp_path / "state"))


@pytest.fixture
def own(tmp_path, tiny_gguf):
    return shutil.copy(tiny_gguf, tmp_path / "own.gguf")


def place(found, target, room=lambda size: None):
    local_copy.place(found, target, room)


def no_links(monkeypatch):
    def other_disk(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", other_disk)


def test_a_file_is_looked_into(own, hashes):
    found = local_copy.look(own, hashes)
    assert (found.kind, found.variant, found.size, found.sha256) == (
        ModelKind.CHAT,
        "Q8_0",
        own.stat().st_size,
        digest(own),
    )


def test_a_folder_is_looked_into(tmp_path, hashes):
    found = local_copy.look(write_embedder(tmp_path / "embedder"), hashes)
    assert (found.kind, found.variant, found.sha256) == (ModelKind.EMBEDDING, "fp32", found.manifest.sha256)


def test_a_link_is_followed_to_the_file(own, hashes, tmp_path):
    (tmp_path / "link.gguf").symlink_to(own)
    found = local_copy.look(tmp_path / "link.gguf", hashes)
    place(found, tmp_path / "store" / "x.gguf")
    assert not (tmp_path / "store" / "x.gguf").is_symlink()
    assert (tmp_path / "store" / "x.gguf").samefile(own)


@pytest.mark.parametrize("name", ["missing.gguf", "state"])
def test_what_is_no_model_is_refused(tmp_path, hashes, name):
    with pytest.raises((BadModelFile, ModelFileMissing)):
        local_copy.look(tmp_path / name, hashes)


def test_where_no_link_can_be_it_is_copied_once_there_is_room(own, hashes, tmp_path, monkeypatch):
    no_links(monkeypatch)
    asked = []
    found = local_copy.look(own, hashes)
    place(found, tmp_path / "store" / "x.gguf", asked.append)
    assert asked == [own.stat().st_size]
    assert (tmp_path / "store" / "x.gguf").read_bytes() == own.read_bytes()
    assert not (tmp_path / "store" / "x.gguf").samefile(own)


def test_without_room_nothing_is_copied(own, hashes, tmp_path, monkeypatch):
    no_links(monkeypatch)

    def full(size):
        raise DiskFull("no room")

    with pytest.raises(DiskFull, match="no room"):
        place(local_copy.look(own, hashes), tmp_path / "store" / "x.gguf", full)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_file_that_changed_meanwhile_is_refused(own, hashes, tmp_path, monkeypatch):
    no_links(monkeypatch)
    found = local_copy.look(own, hashes)
    own.write_bytes(own.read_bytes() + b"more")
    with pytest.raises(BadModelFile, match="changed while"):
        place(found, tmp_path / "store" / "x.gguf")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_folder_is_taken_file_by_file(tmp_path, hashes, monkeypatch):
    folder = write_embedder(tmp_path / "embedder")
    found = local_copy.look(folder, hashes)
    place(found, tmp_path / "store" / "linked")
    no_links(monkeypatch)
    place(found, tmp_path / "store" / "copied")
    for name in ("linked", "copied"):
        there = sorted(
            path.relative_to(tmp_path / "store" / name).as_posix() for path in (tmp_path / "store" / name).rglob("*.*")
        )
        assert there == ["1_Pooling/config.json", "config.json", "model.safetensors"]


def test_a_full_disk_leaves_no_half_of_a_copy(own, hashes, tmp_path):
    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or libc.mount(b"none", os.fsencode(disk), b"tmpfs", 0, b"size=65536") != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(DiskFull, match="the copy was removed"):
            place(local_copy.look(own, hashes), disk / "store" / "x.gguf")
        assert list((disk / "store").iterdir()) == []
        assert own.exists()
    finally:
        assert libc.umount2(os.fsencode(disk), 2) == 0
