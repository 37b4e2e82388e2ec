"""A model folder as a list of files: what belongs to it, and that no line of a stranger's list leads out of it."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.errors import BadModelFile
from tars.mesh.folder_manifest import (
    MOST_MANIFEST,
    Manifest,
    ManifestFile,
    is_model_file,
    is_safe_path,
    listed,
    made,
    open_below,
    parse,
)

A, B = "a" * 64, "b" * 64


def hashed(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "onnx").mkdir()
    for path in ("config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json", "onnx/config.json"):
        (folder / path).write_text(path)
    for path in ("modeling.py", "pytorch_model.bin", ".hidden.json", "README.md"):
        (folder / path).write_text("no part of the model")
    return folder


def test_what_belongs_to_a_model(folder):
    assert listed(folder) == ["1_Pooling/config.json", "config.json", "model.safetensors", "vocab.txt"]


def test_the_list_is_what_sha256sum_reads(folder):
    manifest = made(folder, hashed)
    lines = manifest.text().decode().splitlines()
    assert lines[1] == f"{hashed(folder / 'config.json')}  config.json"
    assert manifest.sha256 == hashlib.sha256(manifest.text()).hexdigest()
    assert parse(manifest.text()) == manifest
    assert manifest.find("vocab.txt").sha256 == hashed(folder / "vocab.txt")
    assert manifest.find("modeling.py") is None


def test_links_are_left_out(folder, tmp_path):
    (tmp_path / "secret.json").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / "2_Dense").symlink_to(tmp_path)
    assert "link.json" not in listed(folder)
    assert not any(path.startswith("2_Dense") for path in listed(folder))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        ".hidden",
        "a/.b",
        "a\\b",
        "a\0b",
        "c:x",
        "é",
        "a b",
        "1/2/3/4/5",
        "a\n",
    ],
)
def test_a_path_that_could_leave_the_folder_is_not_safe(path):
    assert not is_safe_path(path)
    assert not is_model_file(path)


@given(st.text(alphabet="ab./\\ \0~", max_size=12))
def test_a_safe_path_stays_below_its_folder(path):
    if is_safe_path(path):
        assert os.path.normpath(os.path.join("/folder", path)) == "/folder/" + path


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"rubbish\n",
        f"{A}  config.json".encode(),
        f"{A} config.json\n".encode(),
        f"{A.upper()}  config.json\n".encode(),
        f"{A}  ../config.json\n".encode(),
        f"{A}  /etc/x.json\n".encode(),
        f"{A}  modeling.py\n".encode(),
        f"{A}  b.json\n{A}  a.json\n".encode(),
        f"{A}  a.json\n{B}  a.json\n".encode(),
        f"{A}  1_x.json\n{B}  1_x.json/a.json\n".encode(),
        f"{A}  é.json\n".encode(),
        b"x" * (MOST_MANIFEST + 1),
        "".join(f"{A}  {number:06}.json\n" for number in range(3000)).encode(),
    ],
)
def test_a_list_that_nobody_should_have_written_is_refused(text):
    with pytest.raises(BadModelFile, match="damaged"):
        parse(text)


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_parse_or_be_refused(text):
    try:
        manifest = parse(text)
    except BadModelFile:
        return
    assert manifest.text() == text


@given(st.sets(st.sampled_from(["a.json", "b.txt", "1_Pooling/c.json", "model.safetensors"]), min_size=1))
def test_every_list_is_read_as_it_was_written(paths):
    manifest = Manifest(tuple(ManifestFile(path, A) for path in sorted(paths)))
    assert parse(manifest.text()) == manifest


def test_a_file_of_the_list_is_opened_below_the_folder(folder):
    descriptor = open_below(folder, "1_Pooling/config.json")
    with os.fdopen(descriptor) as file:
        assert file.read() == "1_Pooling/config.json"


def test_nothing_is_opened_through_a_link_or_outside(folder, tmp_path):
    (tmp_path / "secret.json").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    (folder / "2_Dense").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.json")
    for path in ("link.json", "2_Dense/secret.json", "pipe.json", "missing.json", "1_Pooling"):
        with pytest.raises(OSError):  # noqa: PT011  # which one differs from system to system
            open_below(folder, path)
    with pytest.raises(ValueError, match="unsafe"):
        open_below(folder, "../secret.json")


def test_a_folder_of_too_many_files_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tars.mesh.folder_manifest.MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.json").write_text("")
    with pytest.raises(BadModelFile, match="more than 3"):
        listed(tmp_path)
