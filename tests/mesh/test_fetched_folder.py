"""The folder of fetched files: names that stay in it, a line on each model, room on its disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from model_stores import NAME, digest
from tiny_gguf import write_tiny_gguf

from tars.catalogue import Catalogue
from tars.core.types import Bytes, ModelKind
from tars.errors import BadModelFile, DiskFull
from tars.mesh.fetched_folder import FetchedFolder, file_name, is_name
from tars.model_files import FileHashes
from tars.state_folder import StateFolder


@pytest.fixture
def make(tmp_path):
    def folder(catalogue=None, margin=0):
        (tmp_path / "state").mkdir(exist_ok=True)
        hashes = FileHashes(StateFolder(tmp_path / "state"))
        return FetchedFolder(tmp_path / "models", catalogue or Catalogue.load(builtin=False), hashes, margin)

    return folder


@pytest.fixture
def entry(tiny_gguf):
    return Catalogue.load(builtin=False).add_file(tiny_gguf, NAME)


def put(folder, file):
    place = folder.path / digest(file) / file.name
    place.parent.mkdir(parents=True)
    return shutil.copy(file, place)


async def test_what_arrived_is_in_the_catalogue_now_and_at_the_next_start(make, entry, tiny_gguf):
    folder = make()
    target = put(folder, tiny_gguf)
    assert await folder.arrived(target, digest(target), entry, entry.variants[0]) == target
    assert folder.path_of(entry, entry.variants[0]) == target
    assert json.loads((target.parent / "model.json").read_text())["sha256"] == digest(target)
    catalogue = Catalogue.load(builtin=False)
    again = make(catalogue)
    again.attach_all()
    assert again.path_of(*(catalogue.find(NAME), catalogue.find(NAME).variants[0])) == target


async def test_a_file_that_would_take_more_memory_than_was_planned_is_refused(make, entry, tmp_path):
    folder = make()
    target = put(folder, write_tiny_gguf(tmp_path / "big.gguf", layers=4))
    small = replace(entry.variants[0], shape=replace(entry.variants[0].shape, tensor_bytes=Bytes(1000)))
    with pytest.raises(BadModelFile, match="its tensors take"):
        await folder.arrived(target, digest(target), entry, small)
    assert not target.parent.exists()


async def test_a_file_is_called_what_the_catalogue_calls_it_whatever_its_header_says(make, entry, tiny_gguf):
    catalogue = Catalogue.load(builtin=False)
    called = replace(entry, variants=(replace(entry.variants[0], name="Q8_XL", local=False),))
    catalogue._register(called)
    folder = make(catalogue)
    target = put(folder, tiny_gguf)
    await folder.arrived(target, digest(target), called, called.variants[0])
    known = catalogue.resolve(NAME)
    assert [each.name for each in known.variants] == ["Q8_XL"]
    assert catalogue.path_of(known, known.variants[0]) == target


def test_an_operators_own_file_stays_where_it_is(make, entry, tiny_gguf):
    catalogue = Catalogue.load(builtin=False)
    catalogue.add_file(tiny_gguf, NAME)
    folder = make(catalogue)
    target = put(folder, tiny_gguf)
    folder.note(target, digest(target), NAME, ModelKind.CHAT, "Q8_0")
    assert folder.path_of(catalogue.find(NAME), catalogue.find(NAME).variants[0]) == tiny_gguf


def test_room_counts_what_is_there_and_what_others_still_write(make):
    folder = make(margin=1000)
    folder.path.mkdir()
    free = shutil.disk_usage(folder.path).free
    folder.require_room("m", free // 2)
    folder.require_room("m", 2 * free, there=2 * free)
    for size, coming in ((2 * free, 0), (free // 2, 2 * free)):
        with pytest.raises(DiskFull) as raised:
            folder.require_room("m", size, coming=coming)
        assert raised.value.details["needed_bytes"] == size
        assert raised.value.details["missing_bytes"] > 0
        assert str(folder.path) not in raised.value.message


@pytest.mark.parametrize("name", ["model.gguf", "Meta-Llama_3.1 (x)".replace("(x)", "b+c"), "a"])
def test_good_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        ".x",
        "x.partial",
        "x.journal",
        "x.folder",
        "model.json",
        "x ",
        "x.",
        "a\0",
        "é",
        5,
        None,
        "x" * 300,
    ],
)
def test_bad_names(name):
    assert not is_name(name)


def test_the_original_name_is_kept_where_it_is_one(entry):
    variant = entry.variants[0]
    assert file_name(entry, replace(variant, file="sub/folder/Tiny.Q8_0.gguf")) == "Tiny.Q8_0.gguf"
    assert file_name(entry, replace(variant, file=None)) == "tiny.Q8_0.gguf"
    assert file_name(replace(entry, name="../../x y/z"), replace(variant, file="..")) == "x-y-z.Q8_0.gguf"
    assert file_name(replace(entry, name="...", kind=ModelKind.EMBEDDING), variant) == "model"


def test_only_what_is_in_the_folder_is_discarded(make, tmp_path, tiny_gguf):
    folder = make()
    outside = tmp_path / "outside" / "x.gguf"
    outside.parent.mkdir()
    outside.write_text("precious")
    folder.discard(outside)
    assert outside.exists()
    target = put(folder, tiny_gguf)
    folder.discard(target)
    assert not target.parent.exists()
