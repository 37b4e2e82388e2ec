"""A node's model files: what it has, and how it comes by what it lacks. Peers are other stores in this process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf

from tars.catalogue import Catalogue
from tars.core.records import HeldFile
from tars.core.types import Bytes, ModelKind, NodeId
from tars.errors import (
    BadModelFile,
    DiskFull,
    InvalidParams,
    ModelFileMissing,
    TarsError,
    TransferFailed,
    UnknownModel,
)
from tars.mesh import model_fetch
from tars.mesh.file_server import FileServer, NotShared
from tars.mesh.file_transfer import FileTransfer, SourceFailed
from tars.mesh.model_fetch import Holder
from tars.mesh.model_store import FileStore
from tars.model_files import FileHashes
from tars.state_folder import StateFolder

NAME = "tiny"


class Peers:
    """Other nodes' stores, by name. `tamper[name]` changes what that one sends; `asked` counts ranges by name."""

    def __init__(self, **stores):
        self.stores = stores
        self.tamper = {}
        self.gone = set()
        self.asked = dict.fromkeys(stores, 0)
        self.gate = None
        self.more = []
        """Further files that somebody says to hold."""

    def holders(self):
        return [
            Holder(NodeId(f"id-{name}"), name, file)
            for name, store in self.stores.items()
            if name not in self.gone
            for file in store.held()
        ] + self.more

    def entry(self, model):
        for store in self.stores.values():
            if (entry := store._catalogue.find(model)) is not None:
                return entry
        return None

    def _opened(self, node, resource):
        name = node.removeprefix("id-")
        if name in self.gone:
            raise SourceFailed("it does not answer", final=True)
        sha256, _, path = resource.partition("/")
        server = FileServer(self.stores[name].shared)
        try:
            return name, server, server.open(sha256, path)
        except NotShared:
            raise SourceFailed("it does not have the file any more", final=True) from None

    async def size(self, node, resource):
        _, _, opened = self._opened(node, resource)
        opened.close()
        return opened.size

    async def read(self, node, resource, start, stop, size):
        name, server, opened = self._opened(node, resource)
        self.asked[name] += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            async with aclosing(server.read(opened, start, stop)) as chunks:
                async for chunk in chunks:
                    yield self.tamper.get(name, lambda content: content)(chunk)
        finally:
            opened.close()


async def until(happened, seconds=20.0):
    """Wait for what a task does on its own."""
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        await asyncio.sleep(0.001)


@pytest.fixture
def make(tmp_path):
    """`make(name)`: a node's store; `make(name, *files)`: one whose catalogue has these files as `NAME`."""

    def store(name, *files, catalogue=None, **options):
        catalogue = catalogue or Catalogue.load(builtin=False)
        for file in files:
            catalogue.add_file(file, NAME)
        state = StateFolder(tmp_path / name)
        state.path.mkdir(exist_ok=True)
        return FileStore(state.path / "models", catalogue, FileHashes(state), **{"margin": 0, **options})

    return store


@pytest.fixture
async def owner(make, tiny_gguf):
    """A node that has the file, hashed."""
    store = make("owner", tiny_gguf)
    await store.files.scan()
    return store


def knowing(store):
    """A catalogue that knows the model, and has no file of it."""
    catalogue = Catalogue.load(builtin=False)
    catalogue._register(store._catalogue.find(NAME))
    return catalogue


def wanted(store):
    entry = store._catalogue.find(NAME)
    return entry, entry.variants[0]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(model_fetch, "FileTransfer", partial(FileTransfer, piece=20_000))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


# --- peers that lie, die or are not ready ---------------------------------------------------------------------------------


async def test_a_peer_that_lies_is_named_and_not_asked_again(make, owner, tiny_gguf, small_pieces, caplog):
    liar = make("liar", tiny_gguf)
    await liar.files.scan()
    peers = Peers(liar=liar, owner=owner)
    peers.tamper["liar"] = lambda content: bytes(len(content))
    store = make("other", peers=peers)
    path = await store.ensure(*wanted(owner))
    assert path.read_bytes() == tiny_gguf.read_bytes()
    assert "id-liar gave wrong bytes" in caplog.text
    shutil.rmtree(path.parent)
    asked = peers.asked["liar"]
    await store.ensure(*wanted(owner))
    assert peers.asked["liar"] == asked


async def test_tampered_bytes_are_never_used(make, owner, tmp_path):
    peers = Peers(owner=owner)
    peers.tamper["owner"] = lambda content: content[:-1] + b"x"
    store = make("other", peers=peers)
    with pytest.raises(TransferFailed) as raised:
        await store.ensure(*wanted(owner))
    assert {
        "place": "owner",
        "reason": "it gave wrong bytes: they do not hash to what it says that they are",
    } in raised.value.details["tried"]
    assert not list((tmp_path / "other" / "models").glob("*/*"))
    assert store._catalogue.find(NAME) is None


@pytest.mark.parametrize("tamper", [lambda c: c + b"more", lambda c: c[:-1]], ids=["longer", "shorter"])
async def test_a_peer_that_sends_another_length_is_named(make, owner, tamper, monkeypatch):
    monkeypatch.setattr("tars.core.transfer.FIRST_PAUSE", 0.001)
    peers = Peers(owner=owner)
    peers.tamper["owner"] = tamper
    with pytest.raises(TransferFailed, match=r"owner: it (sent more|ended in)"):
        await make("other", peers=peers).ensure(*wanted(owner))


async def test_a_file_that_disappears_at_its_peer(make, tmp_path, tiny_gguf):
    copy = shutil.copy(tiny_gguf, tmp_path / "copy.gguf")
    owner = make("owner", copy)
    await owner.files.scan()
    entry, variant = wanted(owner)
    copy.unlink()
    with pytest.raises(TransferFailed, match="owner: it does not have the file any more"):
        await make("other", peers=Peers(owner=owner)).ensure(entry, variant)


async def test_a_peer_that_says_it_has_what_is_another_model(make, owner, tmp_path):
    """Whole and rightly hashed, but of another shape than the catalogue's model of that name."""
    impostor = make("impostor", write_tiny_gguf(tmp_path / "impostor.gguf", layers=5))
    await impostor.files.scan()
    store = make("other", peers=Peers(impostor=impostor), catalogue=knowing(owner))
    entry, variant = wanted(owner)
    with pytest.raises(TarsError, match="not the model that was asked for"):
        await store.ensure(entry, variant)
    assert not list((tmp_path / "other" / "models").glob("*/*.gguf"))


async def test_the_hash_that_the_catalogue_names_is_the_only_one_that_will_do(make, owner, tmp_path):
    entry, variant = wanted(owner)
    with pytest.raises(ModelFileMissing, match="no peer has it"):
        await make("other", peers=Peers(owner=owner)).ensure(entry, replace(variant, sha256="0" * 64))


async def test_a_peer_that_is_still_hashing_is_waited_for(make, tiny_gguf, monkeypatch):
    monkeypatch.setattr(model_fetch, "LOOK_SECONDS", 0.01)
    owner = make("owner", tiny_gguf)
    entry, variant = wanted(owner)
    peers = Peers(owner=owner)
    peers.more = [Holder(NodeId("id-owner"), "owner", HeldFile(NAME, variant.name, Bytes(1)))]
    store = make("other", peers=peers)
    waiting = asyncio.create_task(store.ensure(entry, variant))
    await until(lambda: any("still hashing" in each.note for each in store.transfers()))
    await owner.files.scan()
    peers.more = []
    assert (await waiting).exists()


async def test_one_that_never_ends_hashing_is_named(make, owner):
    entry, variant = wanted(owner)
    peers = Peers()
    peers.more = [Holder(NodeId("id"), "slow", HeldFile(NAME, variant.name, Bytes(1)))]
    with pytest.raises(TarsError, match="slow: it has not hashed the file yet"):
        await make("other", peers=peers, hashing_seconds=0.0).ensure(entry, variant)


@pytest.mark.parametrize("sha256", ["../../etc", "x" * 64, ""])
async def test_a_hash_that_is_none_is_no_folder(make, owner, sha256, tmp_path):
    entry, variant = wanted(owner)
    peers = Peers()
    peers.more = [Holder(NodeId("id"), "odd", HeldFile(NAME, variant.name, Bytes(1), sha256))]
    with pytest.raises(TarsError, match="odd: it gave no sha256"):
        await make("other", peers=peers).ensure(entry, variant)
    assert not (tmp_path / "other" / "models").exists()


async def test_every_place_that_was_tried_stands_in_the_error(make, owner):
    entry, variant = wanted(owner)
    with pytest.raises(ModelFileMissing) as raised:
        await make("other").ensure(entry, variant)
    assert [each["place"] for each in raised.value.details["tried"]] == ["peers", "Hugging Face"]
    assert "`hub = false`" in raised.value.message
    assert "--from-file" in raised.value.message


async def test_a_name_from_the_wire_never_leaves_the_folder(make, owner, tmp_path):
    entry, variant = wanted(owner)
    for bad in ("../../evil.gguf", "/etc/evil.gguf", "a/..", ".hidden", "model.json", "x.partial", "a\0b"):
        store = make("other", peers=Peers(owner=owner), catalogue=Catalogue.load(builtin=False))
        path = await store.ensure(entry, replace(variant, file=bad))
        assert path.parent.parent == tmp_path / "other" / "models"
        assert path.name in ("evil.gguf", f"{NAME}.Q8_0.gguf")
        shutil.rmtree(path.parent)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedder(tmp_path):
    folder = tmp_path / "embedder"
    (folder / "1_Pooling").mkdir(parents=True)
    counts = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **counts}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4000))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "evil.py").write_text("print('never copied')")
    return folder


async def test_a_folder_comes_whole(make, embedder):
    owner = make("owner", embedder)
    await owner.files.scan()
    (held,) = owner.held()
    assert held.folder
    store = make("other", peers=Peers(owner=owner))
    result = await store.pull(NAME)
    path = store.path_of(*wanted(store))
    assert result.sha256 == held.sha256 == path.parent.name
    assert (path / "1_Pooling" / "config.json").read_bytes() == (embedder / "1_Pooling" / "config.json").read_bytes()
    assert (path / "model.safetensors").read_bytes() == (embedder / "model.safetensors").read_bytes()
    assert not (path / "evil.py").exists()
    again = make("other")
    again.attach_fetched()
    assert again._catalogue.resolve(NAME).kind is ModelKind.EMBEDDING
    await again.files.scan()
    assert again.held() == owner.held()


async def test_a_folder_goes_on_where_it_was(make, embedder, tmp_path):
    owner = make("owner", embedder)
    await owner.files.scan()
    peers = Peers(owner=owner)
    files = len(owner.shared(owner.held()[0].sha256).manifest.files)
    peers.gate = asyncio.Event()
    peers.gate.set()
    store = make("other", peers=peers)
    going = asyncio.create_task(store.pull(NAME))
    await until(lambda: peers.asked["owner"] >= 3)
    peers.gate.clear()
    going.cancel()
    await asyncio.wait({going})
    there = list((tmp_path / "other").rglob("*.folder/*.json")) + list((tmp_path / "other").rglob("*.folder/*/*.json"))
    assert there
    peers.gate.set()
    peers.asked["owner"] = 0
    await store.pull(NAME)
    assert peers.asked["owner"] <= 1 + files - len(there)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"config.json", b"../../x.json"),
        lambda text: text.replace(b"config.json", b"/etc/x.json"),
        lambda text: text[:-1],
        lambda text: b"",
    ],
    ids=["leaves", "absolute", "torn", "empty"],
)
async def test_a_manifest_that_lies_is_not_followed(make, embedder, tmp_path, change):
    owner = make("owner", embedder)
    await owner.files.scan()
    peers = Peers(owner=owner)
    peers.tamper["owner"] = change
    store = make("other", peers=peers)
    entry, variant = wanted(owner)
    with pytest.raises(TransferFailed, match="owner: "):
        await store.ensure(entry, variant)
    assert not list(tmp_path.glob("**/x.json"))


async def test_a_link_out_of_a_folder_is_not_given(make, embedder, tmp_path):
    (tmp_path / "secret.json").write_text("not of the model")
    (embedder / "secret.json").symlink_to(tmp_path / "secret.json")
    owner = make("owner", embedder)
    await owner.files.scan()
    shared = owner.shared(owner.held()[0].sha256)
    assert shared.manifest.find("secret.json") is None


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
