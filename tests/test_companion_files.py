"""tars/companion_files.py: what goes with a model is compared with it before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import write_tiny_adapter, write_tiny_gguf

from tars.companion_files import inspect_adapter, inspect_draft
from tars.core.gguf import GgufHeader
from tars.errors import BadModelFile
from tars.model_files import inspect, read_header


@pytest.fixture
def model(tiny_gguf) -> GgufHeader:
    return read_header(tiny_gguf)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_tiny_adapter(tmp_path / "adapter.gguf")


def test_an_adapter_of_the_model_is_taken_with_its_bytes(adapter, model):
    found = inspect_adapter("polite", 0.5, adapter, model)
    assert (found.name, found.scale, found.file_bytes) == ("polite", 0.5, adapter.stat().st_size)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "qwen2"}, "is for another model: it changes a qwen2 model, this one is llama"),
        ({"kind": "model"}, "is no LoRA adapter"),
        ({"method": "ia3"}, "is no LoRA adapter"),
        ({"tensor": "blk.9.attn_q.weight"}, "this model has no tensor blk.9.attn_q.weight"),
        ({"embedding": 96}, "its sizes for blk.0.attn_q.weight are not those of this model"),
        ({"tensor": None}, "it changes no tensor"),
        ({"halves": ("lora_a",)}, "by a pair of matrices"),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused_by_name(tmp_path, model, changes, said):
    path = write_tiny_adapter(tmp_path / "adapter.gguf", **changes)
    with pytest.raises(BadModelFile) as caught:
        inspect_adapter("polite", 1.0, path, model)
    assert caught.value.message.startswith("The adapter polite")
    assert said in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_the_embedding_tables_adapter_is_stored_the_other_way_round(tmp_path, model):
    rows = model.vocabulary_size
    writer = gguf.GGUFWriter(str(tmp_path / "table.gguf"), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("token_embd.weight.lora_a", np.zeros((rows, 4), dtype=np.float32))
    writer.add_tensor("token_embd.weight.lora_b", np.zeros((64, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert inspect_adapter("table", 1.0, tmp_path / "table.gguf", model).name == "table"


def test_a_missing_and_a_damaged_adapter_are_named(tmp_path, adapter, model):
    with pytest.raises(BadModelFile, match="The adapter gone: its file is not where it was said to be"):
        inspect_adapter("gone", 1.0, tmp_path / "none.gguf", model)
    adapter.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(BadModelFile, match="The adapter cut: The file is truncated"):
        inspect_adapter("cut", 1.0, adapter, model)


def test_a_model_is_no_adapter(tiny_gguf, model):
    with pytest.raises(BadModelFile, match="is no LoRA adapter"):
        inspect_adapter("model", 1.0, tiny_gguf, model)


def test_a_draft_model_of_the_same_vocabulary_is_taken(tmp_path, model):
    path = write_tiny_gguf(tmp_path / "draft.gguf", layers=1)
    assert inspect_draft(path, model) == inspect(path).shape


def test_a_draft_model_of_another_vocabulary_is_refused(tiny_gguf, model):
    of_another_kind = replace(model, metadata={**model.metadata, "tokenizer.ggml.model": "gpt2"})
    table = next(each for each in model.tensors if each.name == "token_embd.weight")
    larger = replace(model, tensors=(replace(table, dimensions=(64, model.vocabulary_size + 129)),))
    for other in (of_another_kind, larger):
        with pytest.raises(BadModelFile, match="another vocabulary"):
            inspect_draft(tiny_gguf, other)
    padded = replace(model, tensors=(replace(table, dimensions=(64, model.vocabulary_size + 128)),))
    assert inspect_draft(tiny_gguf, padded).layers == 2


def test_an_adapter_or_nothing_is_no_draft_model(tmp_path, adapter, model):
    with pytest.raises(BadModelFile, match="The draft model: "):
        inspect_draft(adapter, model)
    with pytest.raises(BadModelFile, match="The draft model: its file is not where"):
        inspect_draft(tmp_path / "none.gguf", model)
