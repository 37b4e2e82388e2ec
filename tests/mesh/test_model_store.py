"""A node's model files: what it has, who waits for what it lacks, and what a person is told. Peers are other stores."""

from __future__ import annotations

import asyncio
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from model_stores import NAME, Peers, digest, knowing, store_in, until, wanted, write_embedder
from tiny_gguf import write_tiny_gguf

from tars.catalogue import Catalogue
from tars.core.records import HeldFile
from tars.core.types import Bytes, ModelKind, NodeId
from tars.errors import BadModelFile, DiskFull, InvalidParams, ModelFileMissing, TransferFailed, UnknownModel
from tars.mesh import model_fetch
from tars.mesh.file_transfer import FileTransfer
from tars.mesh.model_fetch import Holder


@pytest.fixture
def make(tmp_path):
    """`make(name, *files)`: a node's store."""
    return lambda name, *files, **options: store_in(tmp_path / name, *files, **options)


@pytest.fixture
async def owner(make, tiny_gguf):
    """A node that has the file, hashed."""
    store = make("owner", tiny_gguf)
    await store.files.scan()
    return store


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(model_fetch, "FileTransfer", partial(FileTransfer, piece=20_000))


@pytest.fixture
def embedder(tmp_path):
    return write_embedder(tmp_path / "embedder")


async def test_a_file_that_is_here_is_not_fetched(owner, tiny_gguf):
    assert await owner.ensure(*wanted(owner)) == tiny_gguf
    assert owner.transfers() == []


async def test_a_file_comes_from_a_peer_and_stays(make, owner, tiny_gguf, tmp_path):
    peers = Peers(owner=owner)
    store = make("other", peers=peers)
    reports = []
    path = await store.ensure(*wanted(owner), reports.append)
    assert path.read_bytes() == tiny_gguf.read_bytes()
    assert path == tmp_path / "other" / "models" / digest(tiny_gguf) / tiny_gguf.name
    assert reports[0].stage == "look"
    assert reports[-1].bytes_total == tiny_gguf.stat().st_size
    assert store.bytes_received == tiny_gguf.stat().st_size
    assert owner.bytes_received == 0
    # At once in the catalogue, and given to others.
    entry = store._catalogue.resolve(NAME)
    assert store._catalogue.path_of(entry, entry.variants[0]) == path
    await store.files.scan()
    assert store.held() == owner.held()
    # And at the next start, without a peer.
    again = make("other")
    again.attach_fetched()
    assert await again.ensure(*wanted(again)) == path


async def test_several_peers_give_together(make, owner, tiny_gguf, small_pieces):
    second = make("second", tiny_gguf)
    await second.files.scan()
    peers = Peers(owner=owner, second=second)
    result = await make("third", peers=peers).pull(NAME)
    assert result.sources == ["owner", "second"]
    assert (result.model, result.sha256) == (NAME, digest(tiny_gguf))
    assert result.size_bytes == tiny_gguf.stat().st_size
    assert all(peers.asked.values())


async def test_two_who_want_the_same_share_one_transfer(make, owner):
    peers = Peers(owner=owner)
    peers.gate = asyncio.Event()
    store = make("other", peers=peers)
    both = [asyncio.create_task(store.ensure(*wanted(owner))) for _ in range(2)]
    await until(lambda: peers.asked["owner"])
    assert [each.model for each in store.transfers()] == [NAME]
    peers.gate.set()
    one, other = await asyncio.gather(*both)
    assert one == other
    assert peers.asked["owner"] == 1
    assert store.transfers() == []


async def test_the_last_one_who_stops_waiting_ends_the_transfer(make, owner):
    peers = Peers(owner=owner)
    peers.gate = asyncio.Event()
    store = make("other", peers=peers)
    first, second = [asyncio.create_task(store.ensure(*wanted(owner))) for _ in range(2)]
    await until(lambda: peers.asked["owner"])
    first.cancel()
    await asyncio.wait({first})
    assert len(store.transfers()) == 1
    second.cancel()
    await asyncio.wait({second})
    assert second.cancelled()
    assert store.transfers() == []
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("fetch")]
    peers.gate.set()
    assert (await store.ensure(*wanted(owner))).exists()


async def test_a_node_that_stops_says_so_to_those_who_wait(make, owner):
    peers = Peers(owner=owner)
    peers.gate = asyncio.Event()
    store = make("other", peers=peers)
    waiting = asyncio.create_task(store.ensure(*wanted(owner)))
    await until(lambda: peers.asked["owner"])
    await store.close()
    with pytest.raises(TransferFailed, match="is kept"):
        await waiting


# --- a file of this PC --------------------------------------------------------------------------------------------------


async def test_a_file_of_this_pc_is_linked_into_the_folder(make, tiny_gguf, tmp_path):
    own = shutil.copy(tiny_gguf, tmp_path / "my file.gguf")
    store = make("node")
    result = await store.add_file(NAME, own)
    assert (result.model, result.variant, result.sources) == (NAME, "Q8_0", ["this PC"])
    path = store.path_of(*wanted(store))
    assert path.samefile(own)
    assert path.name == "my file.gguf"
    again = make("node")
    again.attach_fetched()
    assert again.path_of(*wanted(again)) == path
    assert (await store.add_file(NAME, own)).sources == []


async def test_a_file_that_cannot_be_linked_is_copied(make, tiny_gguf, monkeypatch):
    def other_disk(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", other_disk)
    store = make("node")
    await store.add_file(NAME, tiny_gguf)
    path = store.path_of(*wanted(store))
    assert not path.samefile(tiny_gguf)
    assert path.read_bytes() == tiny_gguf.read_bytes()


async def test_a_folder_of_this_pc_is_taken_too(make, embedder):
    store = make("node")
    result = await store.add_file("mine", embedder)
    assert result.variant == "fp32"
    assert store._catalogue.resolve("mine").kind is ModelKind.EMBEDDING


async def test_a_file_of_this_pc_that_is_another_model_is_refused_and_nothing_stays(make, owner, tmp_path):
    other = write_tiny_gguf(tmp_path / "other.gguf", layers=5)
    with pytest.raises(BadModelFile, match="as another file"):
        await owner.add_file(NAME, other)
    store = make("fresh", catalogue=knowing(owner))
    with pytest.raises(BadModelFile, match="another model"):
        await store.add_file(NAME, other)
    assert not list(tmp_path.glob("*/models/*"))
    assert other.exists()


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (lambda path: path.write_bytes(b""), BadModelFile, "empty"),
        (lambda path: path.write_bytes(b"GGUF" + b"\0" * 100), BadModelFile, "GGUF"),
        (lambda path: None, ModelFileMissing, "not where it was said"),
        (lambda path: path.mkdir(), BadModelFile, "config.json"),
    ],
    ids=["empty", "damaged", "missing", "empty folder"],
)
async def test_a_bad_file_of_this_pc_is_refused(make, tmp_path, prepare, error, words):
    path = tmp_path / "bad.gguf"
    prepare(path)
    with pytest.raises(error, match=words):
        await make("node").add_file(NAME, path)


async def test_a_truncated_file_of_this_pc_is_refused(make, tmp_path, tiny_gguf):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="missing"):
        await make("node").add_file(NAME, path)


async def test_another_quantisation_than_was_said_is_refused(make, tiny_gguf):
    with pytest.raises(BadModelFile, match="holds Q8_0, not Q4_K_M"):
        await make("node").add_file(NAME, tiny_gguf, "Q4_K_M")


async def test_a_relative_path_is_refused(make, tiny_gguf):
    with pytest.raises(BadModelFile, match="from the root"):
        await make("node").add_file(NAME, Path("model.gguf"))


# --- names and room -----------------------------------------------------------------------------------------------------


async def test_an_unknown_model_is_named_with_its_nearest(make, owner):
    with pytest.raises(UnknownModel, match="Did you mean tiny"):
        await owner.pull("tinyy")


async def test_an_unknown_variant_is_answered_with_those_that_there_are(owner):
    with pytest.raises(InvalidParams, match="Q8_0"):
        await owner.pull(NAME, "Q4_0")
    assert (await owner.pull(NAME, "q8_0")).sources == []


async def test_without_a_word_the_usual_quantisation_is_fetched(make):
    store = make("node", catalogue=Catalogue.load(builtin=True))
    entry = store._catalogue.resolve("mistral-7b")
    assert store._chosen(entry, None).name == "Q4_K_M"
    peers = Peers()
    peers.more = [Holder(NodeId("id"), "x", HeldFile(entry.name, "Q8_0", Bytes(1), "0" * 64))]
    store.peers = peers
    assert store._chosen(entry, None).name == "Q8_0"


async def test_a_disk_without_room_is_known_before_anything_is_fetched(make, owner, tiny_gguf):
    peers = Peers(owner=owner)
    store = make("other", peers=peers, margin=10**18)
    with pytest.raises(DiskFull) as raised:
        await store.ensure(*wanted(owner))
    assert raised.value.details["needed_bytes"] == tiny_gguf.stat().st_size
    assert "`folder` in [files]" in raised.value.message
    assert peers.asked["owner"] == 0


async def test_what_was_fetched_before_is_named_where_room_is_missing(make, owner, embedder):
    store = make("other", peers=Peers(owner=owner))
    await store.ensure(*wanted(owner))
    store._folder._margin = 10**18
    with pytest.raises(DiskFull, match=f"{NAME} \\(Q8_0\\) takes"):
        store._folder.require_room("next", 1)


@pytest.mark.parametrize(
    "about", ["", "[]", '{"name": "../../x", "model": "m", "variant": "v", "kind": "chat"}', '{"name": "tiny.gguf"}']
)
async def test_a_line_about_a_model_that_says_nothing_usable_is_left_out(make, tmp_path, about):
    place = tmp_path / "node" / "models" / ("0" * 64)
    place.mkdir(parents=True)
    (place / "model.json").write_text(about)
    (place / "tiny.gguf").write_bytes(b"rubbish")
    store = make("node")
    store.attach_fetched()
    assert store._catalogue.entries == {}


async def test_a_fetched_file_that_went_bad_leaves_the_node_startable(make, owner, caplog):
    store = make("other", peers=Peers(owner=owner))
    path = await store.ensure(*wanted(owner))
    assert json.loads((path.parent / "model.json").read_text())["model"] == NAME
    path.write_bytes(b"not a model any more")
    again = make("other")
    again.attach_fetched()
    assert again._catalogue.find(NAME) is None
    assert "is not used" in caplog.text
