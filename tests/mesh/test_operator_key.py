"""The operator key: for this PC's user, this node's port and this PC's addresses, and for nothing else."""

from __future__ import annotations

import stat
from pathlib import Path

import psutil
import pytest

from tars.mesh.operator_key import (
    OPERATOR_KEY_FILE,
    is_this_pc,
    make_operator_key,
    operator_key_for,
    remove_operator_key,
)


def test_whoever_can_read_the_state_folder_has_the_key(tmp_path: Path) -> None:
    key = make_operator_key(tmp_path, 8000)
    for host in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.0.0.5"):
        assert operator_key_for(f"http://{host}:8000", tmp_path) == key
    assert stat.S_IMODE((tmp_path / OPERATOR_KEY_FILE).stat().st_mode) == 0o600


def test_it_is_new_at_each_start_and_never_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / OPERATOR_KEY_FILE).write_text("old")
    (tmp_path / OPERATOR_KEY_FILE).chmod(0o644)
    first, second = make_operator_key(tmp_path, 8000), make_operator_key(tmp_path, 8000)
    assert first != second
    assert operator_key_for("http://localhost:8000", tmp_path) == second
    assert stat.S_IMODE((tmp_path / OPERATOR_KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8001",
        "http://127.0.0.1",
        "http://192.0.2.7:8000",
        "http://box.lan:8000",
        "http://localhost.evil.example:8000",
        "http://127.0.0.1.evil.example:8000",
        "http://[::ffff:192.0.2.7]:8000",
        "http://0.0.0.0:8000",
        "nonsense",
        "http://[::1:8000",
        "http://127.0.0.1:99999",
        "",
    ],
)
def test_another_port_or_another_machine_does_not_get_it(tmp_path: Path, url: str) -> None:
    make_operator_key(tmp_path, 8000)
    assert operator_key_for(url, tmp_path) is None


def test_this_pcs_own_addresses_count_as_here(tmp_path: Path) -> None:
    key = make_operator_key(tmp_path, 80)
    own = [one.address for entries in psutil.net_if_addrs().values() for one in entries if one.family.name == "AF_INET"]
    assert own
    for address in own:
        assert is_this_pc(address)
        assert operator_key_for(f"http://{address}", tmp_path) == key


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"5", b'{"port": 8000}', b'{"port": 8000, "key": 5}', b'{"port": "8000", "key": "k"}',
        b'{"port": 8000, "key": "a\\nb"}', '{"port": 8000, "key": "é"}'.encode(), b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_damaged_file_is_no_key(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OPERATOR_KEY_FILE).write_bytes(content)
    assert operator_key_for("http://127.0.0.1:8000", tmp_path) is None


def test_no_folder_is_no_key_and_a_stopped_node_leaves_none(tmp_path: Path) -> None:
    assert operator_key_for("http://127.0.0.1:8000", tmp_path / "nowhere") is None
    make_operator_key(tmp_path, 8000)
    remove_operator_key(tmp_path)
    remove_operator_key(tmp_path)
    assert list(tmp_path.iterdir()) == []
