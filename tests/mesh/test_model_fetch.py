"""Files from peers: what a peer may do wrong, and folders. Peers are other stores in this process."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from functools import partial

import pytest
from model_stores import NAME, Peers, knowing, store_in, until, wanted, write_embedder
from tiny_gguf import write_tiny_gguf

from tars.catalogue import Catalogue
from tars.core.records import HeldFile
from tars.core.types import Bytes, ModelKind, NodeId
from tars.errors import ModelFileMissing, TarsError, TransferFailed
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


# --- peers that lie, die or are not ready ---------------------------------------------------------------------------------


async def test_a_peer_that_lies_is_named_and_not_asked_again(make, owner, tiny_gguf, small_pieces, caplog):
    liar = make("liar", tiny_gguf)
    await liar.files.scan()
    peers = Peers(liar=liar, owner=owner)
    peers.tamper["liar"] = lambda content: bytes(len(content))
    store = make("other", peers=peers)
    path = await store.ensure(*wanted(owner))
    assert path.read_bytes() == tiny_gguf.read_bytes()
    assert "liar (id-liar) gave wrong bytes" in caplog.text
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


async def test_who_was_still_hashing_is_asked_when_the_others_gave_wrong_bytes(make, tiny_gguf, monkeypatch):
    monkeypatch.setattr(model_fetch, "LOOK_SECONDS", 0.01)
    liar, slow = make("liar", tiny_gguf), make("slow", tiny_gguf)
    await liar.files.scan()
    entry, variant = wanted(liar)
    peers = Peers(liar=liar, slow=slow)
    peers.tamper["liar"] = lambda chunk: bytes(len(chunk))
    peers.more = [Holder(NodeId("id-slow"), "slow", HeldFile(NAME, variant.name, Bytes(1)))]
    store = make("other", peers=peers)
    waiting = asyncio.create_task(store.ensure(entry, variant))
    await until(lambda: any("slow has it and is still hashing" in each.note for each in store.transfers()))
    assert peers.asked["liar"]
    await slow.files.scan()
    peers.more = []
    assert (await waiting).read_bytes() == tiny_gguf.read_bytes()


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
