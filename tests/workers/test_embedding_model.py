"""Folders of random BERTs, loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_bert

from tars.errors import BadModelFile
from tars.workers.embedding_model import LoadedModel, is_out_of_memory, kind_of

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def folder(path: Path, **files: object) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_what_a_folder_holds_is_read_from_its_files(tmp_path: Path) -> None:
    reranker = {"architectures": ["BertForSequenceClassification"]}
    assert kind_of(folder(tmp_path, config=reranker)) == "rerank"
    with pytest.raises(BadModelFile, match="LlamaForCausalLM"):
        kind_of(folder(tmp_path, config={"architectures": ["LlamaForCausalLM"]}))
    assert kind_of(folder(tmp_path, config={"architectures": ["BertModel"]}, modules=[])) == "embedding"
    said = {"model_type": "CrossEncoder"}
    assert kind_of(folder(tmp_path, config={}, modules=[], config_sentence_transformers=said)) == "rerank"


def test_a_damaged_configuration_is_named_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModelFile, match=r"config\.json") as caught:
        kind_of(tmp_path)
    assert str(tmp_path) not in caught.value.message


def test_the_models_own_facts(tmp_path: Path) -> None:
    model = LoadedModel(str(random_bert.embedder(tmp_path, prompts={"query": "query: "})), "embedding")
    assert (model.most, model.architecture, model.prompts["query"]) == (64, "bert", "query: ")
    assert model.wants_type_ids


def test_a_classifier_is_no_reranker(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="3 numbers"):
        LoadedModel(str(random_bert.cross_encoder(tmp_path, labels=3)), "rerank")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_faults(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory
