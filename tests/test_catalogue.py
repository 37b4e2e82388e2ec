"""tars/catalogue.py: names to entries, entries to files; one bad file takes nothing else down."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars import builtin_models
from tars.catalogue import Catalogue
from tars.config import AdapterSource, ModelSource
from tars.core.types import ModelKind
from tars.errors import BadModelFile, ConfigError, ModelFileMissing, UnknownModel


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue.load()


@pytest.fixture
def empty() -> Catalogue:
    return Catalogue.load(builtin=False)


@pytest.fixture
def copy(tiny_gguf, tmp_path) -> Path:
    """A file of one's own, named like a real one."""
    return Path(shutil.copy(tiny_gguf, tmp_path / "My Model v1.gguf"))


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "My-Encoder"
    path.mkdir()
    config = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    }
    (path / "config.json").write_text(json.dumps(config))
    header = json.dumps({"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
    return path


def source(path: Path, name: str = "mine", **more) -> ModelSource:
    return ModelSource(name=name, path=path, **more)


def local_path(catalogue: Catalogue, name: str) -> Path | None:
    entry = catalogue.resolve(name)
    return catalogue.path_of(entry, entry.variants[0])


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mistral-7b-instruct-v0.2", "mistral-7b", "Mistral-7B", "mistralai/Mistral-7B-Instruct-v0.2"]
)
def test_a_model_is_found_by_name_and_alias_in_any_case(catalogue, name):
    assert catalogue.resolve(name).name == "mistral-7b-instruct-v0.2"
    assert catalogue.find(name) is catalogue.resolve(name)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("mistral-7", "mistral-7b-instruct-v0.2"),
        ("phi3-mini", "phi-3-mini-4k-instruct"),
        ("all-MiniLM-L6", "all-minilm-l6-v2"),
        ("deepseek", "deepseek-coder-33b-instruct"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(catalogue, typed, nearest):
    assert catalogue.find(typed) is None
    with pytest.raises(UnknownModel) as caught:
        catalogue.resolve(typed)
    assert nearest in caught.value.details["nearest"]
    assert nearest in caught.value.message
    assert "mistral-7b-instruct-v0.2" in caught.value.details["known"]


def test_a_name_near_nothing_points_to_the_list(catalogue):
    with pytest.raises(UnknownModel, match=r"models\.list"):
        catalogue.resolve("zzzzzz")


def test_an_enormous_name_is_not_echoed(catalogue):
    with pytest.raises(UnknownModel) as caught:
        catalogue.resolve("x" * 100_000)
    assert len(caught.value.message) < 500


# --- the demo models --------------------------------------------------------------------------------------------------


def test_the_help_desk_is_read_from_its_file(tiny_gguf, monkeypatch):
    monkeypatch.setitem(builtin_models._BUNDLED, "help-desk", lambda: tiny_gguf)
    catalogue = Catalogue.load()
    assert local_path(catalogue, "tars-help-desk") == tiny_gguf
    assert catalogue.resolve("help-desk").variants[0].shape.layers == 2


def test_without_its_file_the_help_desk_says_how_to_get_it_and_the_rest_is_served(tiny_gguf, tmp_path, monkeypatch):
    later = tmp_path / "tars-help-desk.gguf"
    monkeypatch.setitem(builtin_models._BUNDLED, "help-desk", lambda: later)
    catalogue = Catalogue.load()
    with pytest.raises(ModelFileMissing, match="scripts/setup"):
        catalogue.resolve("tars-help-desk")
    assert catalogue.find("tars-help-desk").variants == ()
    assert catalogue.resolve("mistral-7b")
    shutil.copy(tiny_gguf, later)
    assert local_path(catalogue, "tars-help-desk") == later


def test_without_its_package_minilm_is_still_known_by_its_counts(monkeypatch):
    monkeypatch.setitem(builtin_models._BUNDLED, "minilm", lambda: None)
    catalogue = Catalogue.load()
    assert local_path(catalogue, "all-minilm-l6-v2") is None
    assert catalogue.resolve("minilm").variants[0].shape.file_bytes == 90_868_376


def test_with_its_package_minilm_is_here(folder, monkeypatch):
    real = json.loads((folder / "config.json").read_text())
    real |= {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 1536}
    (folder / "config.json").write_text(json.dumps(real))
    monkeypatch.setitem(builtin_models._BUNDLED, "minilm", lambda: folder)
    catalogue = Catalogue.load()
    assert local_path(catalogue, "minilm") == folder
    variant = catalogue.resolve("minilm").variants[0]
    assert (variant.name, variant.local, variant.repo) == ("fp32", True, "sentence-transformers/all-MiniLM-L6-v2")


# --- files given on the command line ----------------------------------------------------------------------------------


def test_any_gguf_is_a_chat_model_named_by_its_metadata(empty, copy):
    entry = empty.add_file(copy)
    assert (entry.name, entry.kind, entry.aliases) == ("tiny-random-llama", ModelKind.CHAT, ("my-model-v1",))
    assert [(each.name, each.local) for each in entry.variants] == [("Q8_0", True)]
    assert empty.path_of(entry, entry.variants[0]) == copy
    assert empty.resolve("my-model-v1") == entry


def test_a_given_name_wins_over_the_files(empty, copy):
    assert empty.add_file(copy, "mine", aliases=["also-mine"]).name == "mine"
    assert empty.resolve("also-mine").name == "mine"
    assert empty.find("tiny-random-llama") is None


def test_the_same_file_twice_is_one_model(empty, copy):
    assert empty.add_file(copy) == empty.add_file(copy)
    assert len(empty.entries) == 1


def test_two_files_of_one_title_go_by_their_own_names(empty, copy, tmp_path):
    other = Path(shutil.copy(copy, tmp_path / "other.gguf"))
    assert [empty.add_file(path).name for path in (copy, other)] == ["tiny-random-llama", "other"]
    third = tmp_path / "again"
    third.mkdir()
    with pytest.raises(ConfigError, match=r"\[\[model\]\]"):
        empty.add_file(shutil.copy(copy, third / "other.gguf"))


def test_a_name_without_a_letter_still_makes_a_model(empty, tmp_path):
    from tiny_gguf import write_tiny_gguf

    first = write_tiny_gguf(tmp_path / "模型.gguf")
    assert empty.add_file(first).aliases == ("model",)


def test_a_built_in_models_file_is_that_model(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tars.catalogue._counts_of", lambda shape: ()
    )  # a 4 GB file of Mistral's counts is not made here
    from tiny_gguf import write_tiny_gguf

    path = write_tiny_gguf(tmp_path / "mistral-7b-instruct-v0.2.Q8_0.gguf")
    entry = catalogue.add_file(path)
    assert entry.name == "mistral-7b-instruct-v0.2"
    assert [(each.name, each.local) for each in entry.variants] == [("Q8_0", True), ("Q4_K_M", False)]
    assert entry.variants[0].repo == "TheBloke/Mistral-7B-Instruct-v0.2-GGUF"
    assert entry.variants[0].shape.file_bytes == path.stat().st_size


def test_a_file_only_named_like_a_built_in_model_is_another_one(catalogue, tiny_gguf, tmp_path):
    path = Path(shutil.copy(tiny_gguf, tmp_path / "mistral-7b-instruct-v0.2.Q8_0.gguf"))
    assert catalogue.add_file(path).name == "tiny-random-llama"


def test_another_model_under_a_built_in_name_is_refused(catalogue, tiny_gguf):
    with pytest.raises(BadModelFile, match="holds another model"):
        catalogue.add_file(tiny_gguf, "mistral-7b")


def test_a_folder_is_an_embedding_model(empty, folder):
    entry = empty.add_file(folder)
    assert (entry.name, entry.kind, entry.variants[0].name) == ("my-encoder", ModelKind.EMBEDDING, "fp32")
    assert empty.path_of(entry, entry.variants[0]) == folder


def test_a_kind_that_the_file_cannot_be_is_refused(empty, copy, folder):
    with pytest.raises(ConfigError, match="embedding"):
        empty.add_file(copy, kind="embedding")
    with pytest.raises(ConfigError, match="folder"):
        empty.add_file(folder, kind="chat")
    with pytest.raises(ConfigError, match="chat, embedding, rerank"):
        empty.add_file(copy, kind="painting")
    assert empty.entries == {}


def test_a_bad_file_on_the_command_line_is_refused_at_once(empty, tmp_path):
    (tmp_path / "bad.gguf").write_text("no")
    with pytest.raises(BadModelFile):
        empty.add_file(tmp_path / "bad.gguf")
    with pytest.raises(ModelFileMissing):
        empty.add_file(tmp_path / "none.gguf")
    assert empty.entries == {}


def test_a_file_that_was_deleted_is_no_longer_here(empty, copy):
    empty.add_file(copy, "mine")
    copy.unlink()
    assert local_path(empty, "mine") is None


# --- the configuration's models ---------------------------------------------------------------------------------------


def test_a_configured_model_is_served_under_its_name_and_aliases(copy):
    catalogue = Catalogue.load(extra=[source(copy, aliases=("me",), description="Mine.")])
    assert local_path(catalogue, "me") == copy
    assert catalogue.resolve("mine").description == "Mine."


def test_a_kind_that_nobody_wrote_is_the_files(folder):
    assert Catalogue.load(extra=[source(folder)]).resolve("mine").kind is ModelKind.EMBEDDING
    with pytest.raises(ConfigError, match="folder"):
        Catalogue.load(extra=[source(folder, kind=ModelKind.CHAT)])


def test_a_reranker_is_recognised(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    assert Catalogue.load(extra=[source(folder)]).resolve("mine").kind is ModelKind.RERANK


def test_two_files_under_one_name_are_two_variants(tiny_gguf, tmp_path):
    content = tiny_gguf.read_bytes()
    key = b"general.file_type" + struct.pack("<II", 4, 7)
    assert content.count(key) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(key, b"general.file_type" + struct.pack("<II", 4, 15)))
    catalogue = Catalogue.load(builtin=False, extra=[source(tiny_gguf), source(other)])
    entry = catalogue.resolve("mine")
    assert [each.name for each in entry.variants] == ["Q8_0", "Q4_K_M"]
    assert [catalogue.path_of(entry, each) for each in entry.variants] == [tiny_gguf, other]


@pytest.mark.parametrize("kind", [ModelKind.CHAT, ModelKind.EMBEDDING])
def test_a_configured_file_that_is_missing_stops_nobody_and_may_come_later(tiny_gguf, folder, tmp_path, kind):
    later = tmp_path / "later"
    catalogue = Catalogue.load(extra=[source(later, kind=kind)])
    assert catalogue.resolve("mistral-7b")
    for _ in range(2):
        with pytest.raises(ModelFileMissing):
            catalogue.resolve("mine")
    if kind is ModelKind.CHAT:
        shutil.copy(tiny_gguf, later)
    else:
        shutil.copytree(folder, later)
    assert local_path(catalogue, "mine") == later


def test_a_bad_file_is_reported_by_each_call_but_logged_once_until_it_changes(tiny_gguf, tmp_path, caplog):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    catalogue = Catalogue.load(builtin=False, extra=[source(path)])
    logged = len(caplog.records)
    assert logged
    for _ in range(3):
        with pytest.raises(BadModelFile, match="truncated"):
            catalogue.resolve("mine")
    assert len(caplog.records) == logged
    path.write_bytes(tiny_gguf.read_bytes()[:-500])
    with pytest.raises(BadModelFile, match="truncated"):
        catalogue.resolve("mine")
    assert len(caplog.records) > logged
    shutil.copy(tiny_gguf, path)
    assert local_path(catalogue, "mine") == path


def test_a_bad_file_beside_a_good_one_leaves_the_good_one(tiny_gguf, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_text("no")
    catalogue = Catalogue.load(builtin=False, extra=[source(tiny_gguf), source(bad)])
    assert local_path(catalogue, "mine") == tiny_gguf


def test_a_built_in_model_whose_configured_file_is_bad_says_so(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_text("no")
    catalogue = Catalogue.load(extra=[source(bad, "mistral-7b")])
    with pytest.raises(BadModelFile):
        catalogue.resolve("mistral-7b-instruct-v0.2")
    assert len(catalogue.find("mistral-7b").variants) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "mine", "aliases": ("mistral-7b",)},
        {"name": "phi-2", "aliases": ("mistral-7b",)},
        {"name": "phi-2", "kind": ModelKind.EMBEDDING},
        {"name": "line\nbreak"},
    ],
)
def test_names_that_clash_are_refused_before_anything_is_served(copy, wrong):
    with pytest.raises(ConfigError):
        Catalogue.load(extra=[source(copy, **wrong)])


def test_names_do_not_depend_on_the_working_folder(empty, copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    entry = empty.add_file(copy.name, "mine")
    monkeypatch.chdir("/")
    assert os.fspath(empty.path_of(entry, entry.variants[0])) == os.fspath(copy)


# --- adapters and draft models -----------------------------------------------------------------------------------------


def test_adapters_and_a_draft_model_stand_at_their_model(copy, tmp_path):
    adapter, draft = write_tiny_adapter(tmp_path / "legal.gguf"), write_tiny_gguf(tmp_path / "draft.gguf", layers=1)
    given = (AdapterSource(name="legal", path=adapter, scale=0.5),)
    catalogue = Catalogue.load(builtin=False, extra=[source(copy, adapters=given, draft=draft)])
    entry = catalogue.resolve("mine")
    (found,) = entry.adapters
    assert (found.name, found.scale, found.file_bytes) == ("legal", 0.5, adapter.stat().st_size)
    assert entry.draft is not None
    assert entry.draft.layers == 1
    assert (catalogue.adapter_path(entry, found), catalogue.draft_path(entry)) == (adapter, draft)
    plain = Catalogue.load(builtin=False, extra=[source(copy)])
    assert plain.draft_path(plain.resolve("mine")) is None


def test_a_model_whose_adapter_is_bad_says_which_until_the_file_is_right(copy, tmp_path):
    path = tmp_path / "legal.gguf"
    catalogue = Catalogue.load(builtin=False, extra=[source(copy, adapters=(AdapterSource(name="legal", path=path),))])
    with pytest.raises(BadModelFile, match="The adapter legal: its file is not where"):
        catalogue.resolve("mine")
    write_tiny_adapter(path, architecture="qwen2")
    with pytest.raises(BadModelFile, match="The adapter legal is for another model"):
        catalogue.resolve("mine")
    write_tiny_adapter(path)
    assert [each.name for each in catalogue.resolve("mine").adapters] == ["legal"]


def test_a_bad_draft_model_is_named(copy, tmp_path):
    catalogue = Catalogue.load(builtin=False, extra=[source(copy, draft=tmp_path / "none.gguf")])
    with pytest.raises(BadModelFile, match="The draft model: its file is not where"):
        catalogue.resolve("mine")


def test_a_folder_has_no_adapters(folder, tmp_path):
    given = (AdapterSource(name="legal", path=tmp_path / "legal.gguf"),)
    with pytest.raises(ConfigError, match="adapters and draft are for chat models"):
        Catalogue.load(builtin=False, extra=[source(folder, adapters=given)])


def test_a_file_may_be_called_otherwise_than_its_header_says(tiny_gguf):
    catalogue = Catalogue.load(builtin=False)
    entry = catalogue.add_file(tiny_gguf, "tiny", variant="Q8_XL")
    assert [each.name for each in entry.variants] == ["Q8_XL"]
    assert catalogue.path_of(entry, entry.variants[0]) == tiny_gguf
