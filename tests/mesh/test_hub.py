"""Files from the hub, against a local server that answers like it; every refusal is one sentence on what to do."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from pretended_hub import COMMIT, PretendedHub, git_sha1

from tars.catalogue import Catalogue
from tars.core.types import ModelKind
from tars.errors import BadModelFile, DiskFull, InvalidParams, ModelFileMissing, TransferFailed
from tars.mesh.file_transfer import SourceFailed
from tars.mesh.hub import Hub, HubName, hub_name
from tars.mesh.model_store import FileStore
from tars.mesh.partial_file import Digest
from tars.model_files import FileHashes
from tars.state_folder import StateFolder

REPO = "someone/tiny-GGUF"


@pytest.fixture
async def server(aiohttp_server, tiny_gguf):
    hub = PretendedHub({REPO: {"tiny.Q8_0.gguf": tiny_gguf.read_bytes(), "README.md": b"hello"}})
    application, cdn = hub.applications()
    hub.endpoint = str((await aiohttp_server(application)).make_url("/")).rstrip("/")
    hub.cdn = str((await aiohttp_server(cdn)).make_url("/")).rstrip("/")
    return hub


@pytest.fixture
async def hub(server):
    one = Hub({"HF_ENDPOINT": server.endpoint})
    yield one
    await one.close()


@pytest.fixture
async def store(server, tmp_path):
    stores = []

    def make(catalogue=None, **environment):
        state = StateFolder(tmp_path / "state")
        state.path.mkdir(exist_ok=True)
        one = FileStore(
            state.path / "models",
            catalogue or Catalogue.load(builtin=False),
            FileHashes(state),
            hub=Hub({"HF_ENDPOINT": server.endpoint, **environment}),
            margin=0,
        )
        stores.append(one)
        return one

    yield make
    for one in stores:
        await one.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf.co/owner/repo/file.gguf", HubName("owner/repo", "file.gguf")),
        ("https://huggingface.co/owner/repo/blob/main/sub/file.gguf", HubName("owner/repo", "sub/file.gguf", "main")),
        (
            "https://huggingface.co/owner/repo/resolve/v2/file.gguf?download=true",
            HubName("owner/repo", "file.gguf", "v2"),
        ),
        ("owner/repo:file.gguf", HubName("owner/repo", "file.gguf")),
        ("hf.co/owner/repo:Q4_K_M", HubName("owner/repo", "Q4_K_M")),
        ("hf.co/owner/repo", HubName("owner/repo")),
        ("https://hf.co/owner/repo/tree/main", HubName("owner/repo", None, "main")),
        ("owner/repo", None),
        ("mistral-7b", None),
        ("help-desk:polite", None),
        ("hf.co/owner", None),
        ("owner/../repo:file", None),
        ("hf.co/owner/repo/../../x.gguf", None),
        ("", None),
    ],
)
def test_names_of_files_on_the_hub(text, name):
    assert hub_name(text) == name


async def test_a_file_is_its_commit_size_and_checksum(hub, tiny_gguf):
    content = tiny_gguf.read_bytes()
    found = await hub.file(REPO, "tiny.Q8_0.gguf")
    assert (found.commit, found.size) == (COMMIT, len(content))
    assert found.digest == Digest("sha256", hashlib.sha256(content).hexdigest())
    small = await hub.file(REPO, "README.md")
    assert (small.size, small.digest) == (5, Digest("git-sha1", git_sha1(b"hello")))
    assert {each.path: each.digest for each in await hub.files(REPO)} == {
        "tiny.Q8_0.gguf": found.digest,
        "README.md": small.digest,
    }


async def test_a_model_is_fetched_by_its_name_on_the_hub(store, server, tiny_gguf):
    one = store()
    for name in (f"hf.co/{REPO}/tiny.Q8_0.gguf", f"{REPO}:tiny.Q8_0.gguf", f"hf.co/{REPO}:q8_0", f"hf.co/{REPO}"):
        result = await one.pull(name)
        assert result.model == "tiny-random-llama"
        assert result.sha256 == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert result.sources == ["Hugging Face"]
    entry = one._catalogue.resolve("tiny-random-llama")
    assert one.path_of(entry, entry.variants[0]).read_bytes() == tiny_gguf.read_bytes()
    assert server.leaked == []


async def test_a_model_of_the_catalogue_is_fetched_from_its_repository(store, server, tiny_gguf):
    source = Catalogue.load(builtin=False)
    entry = source.add_file(tiny_gguf, "tiny")
    known = replace(entry, variants=(replace(entry.variants[0], repo=REPO, file="tiny.Q8_0.gguf", local=False),))
    catalogue = Catalogue.load(builtin=False)
    catalogue._register(known)
    one = store(catalogue)
    reports = []
    path = await one.ensure(known, known.variants[0], reports.append)
    assert path.read_bytes() == tiny_gguf.read_bytes()
    assert path.parent.name == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert (await one.pull("tiny")).sources == []


async def test_an_address_that_ended_is_asked_for_again(hub, server, tiny_gguf):
    source = hub.source(await hub.file(REPO, "tiny.Q8_0.gguf"))
    server.signature = 2
    got = b"".join([chunk async for chunk in source.read(10, 200)])
    assert got == tiny_gguf.read_bytes()[10:200]
    assert server.asked[-1] == f"{REPO}@{COMMIT}:tiny.Q8_0.gguf"


@pytest.mark.parametrize(("fault", "final"), [(403, True), (404, True), (500, False), (416, True), (200, True)])
async def test_what_the_bytes_origin_refuses(hub, server, fault, final):
    source = hub.source(await hub.file(REPO, "tiny.Q8_0.gguf"))
    server.cdn_fault = fault
    with pytest.raises(SourceFailed) as raised:
        async for _ in source.read(0, 10):
            pass
    assert raised.value.final is final


async def test_too_many_requests_are_waited_for(hub, server):
    source = hub.source(await hub.file(REPO, "tiny.Q8_0.gguf"))
    server.cdn_fault = 429
    with pytest.raises(SourceFailed) as raised:
        async for _ in source.read(0, 10):
            pass
    assert raised.value.pause == 5.0


async def test_tampered_bytes_are_never_used(store, server, tmp_path):
    server.change_bytes = True
    with pytest.raises(TransferFailed, match="do not hash"):
        await store().pull(f"{REPO}:tiny.Q8_0.gguf")
    assert not list(tmp_path.rglob("*.gguf"))


# --- refusals -----------------------------------------------------------------------------------------------------------


async def test_a_gated_repository_without_and_with_a_token(store, server):
    server.gated[REPO] = {"granted"}
    name = f"{REPO}:tiny.Q8_0.gguf"
    with pytest.raises(ModelFileMissing, match=r"is gated\. Accept its terms .* HF_TOKEN"):
        await store().pull(name)
    with pytest.raises(ModelFileMissing, match="the account of this node's token may not have it"):
        await store(HF_TOKEN="other").pull(name)
    assert (await store(HF_TOKEN="granted").pull(name)).sources == ["Hugging Face"]
    # The token went to the hub, and not on to where the bytes are.
    assert server.leaked == []


async def test_a_private_repository_is_like_a_missing_one(store, server):
    server.private[REPO] = {"mine"}
    with pytest.raises(ModelFileMissing, match=r"There is no repository .*, or it is private"):
        await store().pull(f"{REPO}:tiny.Q8_0.gguf")
    with pytest.raises(ModelFileMissing, match="There is no repository"):
        await store().pull("nobody/nothing:x.gguf")
    assert (await store(HF_TOKEN="mine").pull(f"{REPO}:tiny.Q8_0.gguf")).sources == ["Hugging Face"]


async def test_a_missing_file_and_a_missing_revision(store):
    with pytest.raises(ModelFileMissing, match=r"has no file other\.gguf"):
        await store().pull(f"{REPO}:other.gguf")
    with pytest.raises(ModelFileMissing, match="no such revision"):
        await store().pull(f"hf.co/{REPO}/resolve/v9/tiny.Q8_0.gguf")


async def test_a_refused_token(store):
    with pytest.raises(ModelFileMissing, match="refuses this node's access token"):
        await store(HF_TOKEN="wrong").pull(f"{REPO}:tiny.Q8_0.gguf")


@pytest.mark.parametrize(
    ("fault", "words"), [(429, "too many requests"), (500, "a fault of its own"), (504, "a fault")]
)
async def test_the_hubs_own_faults_are_worth_another_try(store, server, fault, words):
    server.fault = fault
    with pytest.raises(TransferFailed, match=words):
        await store().pull(f"{REPO}:tiny.Q8_0.gguf")


async def test_no_network_is_one_sentence():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        hub = Hub({"HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}"})
        with pytest.raises(TransferFailed, match=r"cannot be reached .* HF_ENDPOINT"):
            await hub.file(REPO, "x.gguf")


async def test_offline_asks_nobody(server):
    hub = Hub({"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "1"})
    with pytest.raises(ModelFileMissing, match="HF_HUB_OFFLINE is set"):
        await hub.file(REPO, "tiny.Q8_0.gguf")
    assert server.asked == []


async def test_without_a_checksum_nothing_is_fetched(hub, server):
    server.plain = True
    with pytest.raises(ModelFileMissing, match="gives no checksum"):
        await hub.file(REPO, "tiny.Q8_0.gguf")


async def test_several_files_and_no_word_which(store, server):
    server.repos[REPO].update({"tiny.Q4_K_S.gguf": b"x", "tiny.Q4_0.gguf": b"y"})
    with pytest.raises(InvalidParams, match=f"{REPO}:tiny.Q4_0.gguf"):
        await store().pull(f"hf.co/{REPO}")
    assert (await store().pull(f"hf.co/{REPO}", "Q8_0")).variant == "Q8_0"


async def test_a_repository_with_no_model_in_it(store, server):
    server.repos["a/b"] = {"README.md": b"x"}
    with pytest.raises(ModelFileMissing, match=r"has no \.gguf file"):
        await store().pull("hf.co/a/b")


async def test_a_file_that_is_no_model_leaves_nothing(store, server, tmp_path):
    server.repos["a/b"] = {"x.gguf": b"no model"}
    with pytest.raises(BadModelFile, match="not the model that was asked for"):
        await store().pull("a/b:x.gguf")
    assert not list((tmp_path / "state" / "models").glob("*"))


async def test_an_embedding_model_is_fetched_as_a_folder(store, server):
    counts = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    server.repos["org/embedder"] = {
        "config.json": json.dumps({"model_type": "bert", **counts}).encode(),
        "1_Pooling/config.json": b"{}",
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(4000),
        "onnx/model.json": b"an export that is not wanted",
        "pytorch_model.bin": b"a pickle that is not wanted",
        "modeling.py": b"code that is not wanted",
    }
    one = store()
    result = await one.pull("hf.co/org/embedder")
    entry = one._catalogue.resolve(result.model)
    assert entry.kind is ModelKind.EMBEDDING
    path = one.path_of(entry, entry.variants[0])
    assert sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()) == [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
    ]
    assert path.parent.name == result.sha256
    # The other way, the same folder: peers name it alike.
    assert not list(path.parent.parent.glob("hub-*"))


async def test_a_disk_without_room_is_known_before_a_byte_comes(store, server):
    one = store()
    one._folder._margin = 10**18
    with pytest.raises(DiskFull):
        await one.pull(f"{REPO}:tiny.Q8_0.gguf")
    assert server.ranges == []


@pytest.mark.slow
def test_the_library_is_not_loaded_before_it_is_needed():
    program = "import sys, tars.mesh.model_store; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_closing_a_hub_that_was_never_asked():
    asyncio.run(Hub({}).close())
