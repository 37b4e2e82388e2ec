"""Files of states that wait for their successors: had once, gone in every case."""

import asyncio
import hashlib
import os

import pytest

from tars.core.types import NodeId
from tars.serving import kept_states
from tars.serving.kept_states import KeptStates


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sequence-1.state"
    path.touch(0o600)
    path.write_bytes(b"cells")
    return path


async def test_it_is_had_once_and_gone_then(file, tmp_path):
    kept = KeptStates(NodeId("n"))
    saved = await kept.keep(file)
    assert (saved.node, saved.bytes, saved.sha256) == ("n", 5, hashlib.sha256(b"cells").hexdigest())
    assert len(saved.id) == 32
    (there,) = tmp_path.iterdir()
    assert there.stat().st_mode & 0o777 == 0o600
    waiting = asyncio.create_task(kept.collected())
    with kept.taken("another") as path:
        assert path is None
    with kept.taken(saved.id) as path:
        assert path.read_bytes() == b"cells"
        with kept.taken(saved.id) as twice:
            assert twice is None
        await asyncio.sleep(0)
        assert not waiting.done(), "it is being read"
    await waiting
    assert os.listdir(tmp_path) == []


async def test_an_answer_that_goes_on_on_this_node_has_the_file_itself(file):
    kept = KeptStates(NodeId("n"))
    saved = await kept.keep(file)
    path = kept.handed_on(saved.id)
    assert path.read_bytes() == b"cells"
    assert kept.handed_on(saved.id) is None
    await kept.collected()


async def test_what_nobody_asks_for_is_removed(file, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_states, "KEEP_SECONDS", 0.01)
    kept = KeptStates(NodeId("n"))
    saved = await kept.keep(file)
    async with asyncio.timeout(5):
        await kept.collected()
    assert os.listdir(tmp_path) == []
    assert kept.handed_on(saved.id) is None


async def test_closing_removes_all(file, tmp_path):
    kept = KeptStates(NodeId("n"))
    await kept.keep(file)
    assert len(kept) == 1
    kept.close()
    assert os.listdir(tmp_path) == []
    await kept.collected()


async def test_more_than_may_be_kept_is_not(file, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_states, "KEEP_BYTES_MOST", 9)
    kept = KeptStates(NodeId("n"))
    first = await kept.keep(file)
    file.write_bytes(b"cells")
    assert await kept.keep(file) is None
    assert file.exists(), "it is still its giver's"
    kept.discard(first.id)
    assert await kept.keep(file) is not None
    assert await kept.keep(tmp_path / "none") is None
