"""A node's state folder: one process at a time, whole files only."""

import errno
import os
import stat
import uuid

import pytest

from tars import state_folder
from tars.errors import ConfigError, DiskFull
from tars.state_folder import StateFolder, fresh_node_id, write_atomically


@pytest.fixture
def folder(tmp_path):
    opened = StateFolder(tmp_path / "state")
    opened.open()
    yield opened
    opened.close()
    assert not list(opened.path.glob("*.partial"))


def test_a_node_keeps_its_id_over_restarts(folder):
    first = folder.node_id()
    assert uuid.UUID(first)
    assert StateFolder(folder.path).node_id() == first


def test_a_damaged_id_file_is_replaced_by_a_good_one(folder):
    (folder.path / "node.json").write_bytes(b'{"id": "not a uu')
    made = folder.node_id()
    assert uuid.UUID(made)
    assert folder.node_id() == made


def test_a_second_process_is_refused_with_the_holders_number(folder):
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}.*--state-dir"):
        StateFolder(folder.path).open()


def test_the_lock_is_free_again_after_close(tmp_path):
    first = StateFolder(tmp_path)
    first.open()
    first.close()
    second = StateFolder(tmp_path)
    second.open()
    second.close()


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--state-dir"):
        StateFolder(tmp_path / "file" / "state").open()


def test_a_missing_or_damaged_json_file_reads_as_empty(folder):
    assert folder.read_json("nothing.json") == {}
    (folder.path / "bad.json").write_text("{")
    assert folder.read_json("bad.json") == {}


def test_a_full_disk_keeps_the_old_content_and_leaves_no_partial_file(folder, monkeypatch):
    folder.write_json("x.json", {"old": True})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_folder.os, "fsync", full)
    with pytest.raises(DiskFull, match="nothing was lost"):
        folder.write_json("x.json", {"new": True})
    assert folder.read_json("x.json") == {"old": True}


def test_another_write_error_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "x.json", b"{}")


def test_a_full_disk_at_the_very_start_is_said_as_such(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)
    monkeypatch.setattr(os, "fsync", no_space)
    opened = StateFolder(tmp_path)
    opened.open()
    with pytest.raises(DiskFull, match="full"):
        opened.node_id()
    with pytest.raises(ConfigError, match="another tars-node"):
        StateFolder(tmp_path).open()
    opened.close()


def test_opening_removes_what_a_killed_node_left_half_written(tmp_path):
    (tmp_path / "deployments.json.4242.partial").write_bytes(b"{")
    (tmp_path / "deployments.json").write_bytes(b"{}")
    (tmp_path / "sequences").mkdir()
    (tmp_path / "sequences" / "sequence-abc.state").write_bytes(b"of nobody any more")
    folder = StateFolder(tmp_path)
    folder.open()
    assert {path.name for path in tmp_path.iterdir()} == {"deployments.json", "lock", "sequences"}
    assert list((tmp_path / "sequences").iterdir()) == []
    folder.close()


def test_a_new_id_replaces_the_old_one_for_good(folder):
    first = folder.node_id()
    second = fresh_node_id()
    folder.set_node_id(second)
    assert uuid.UUID(second)
    assert first != second == StateFolder(folder.path).node_id()


def test_a_secret_is_never_readable_by_others_not_for_a_moment(tmp_path, monkeypatch):
    modes = []

    def replace(source, target):
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(state_folder.os, "replace", replace)
    before = os.umask(0)
    try:
        write_atomically(tmp_path / "secret", b"x", mode=0o600)
        write_atomically(tmp_path / "plain", b"x")
    finally:
        os.umask(before)
    assert modes == [0o600, 0o666]
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
