"""Exports to ONNX Runtime and OpenVINO: the cache always, the real thing where the packages are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import random_bert

np = pytest.importorskip("numpy")
from tars.workers import embedding_exports  # noqa: E402
from tars.workers.embedding_backends import CannotBuild, TorchPadded  # noqa: E402
from tars.workers.embedding_exports import (  # noqa: E402
    OnnxBackend,
    OpenVinoBackend,
    cache_folder,
    export_key,
    installed,
)
from tars.workers.embedding_model import LoadedModel  # noqa: E402

pytestmark = [
    pytest.mark.model,
    # Third-party noise of tracing and of their imports.
    pytest.mark.filterwarnings("ignore"),
]


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bert.embedder(tmp_path_factory.mktemp("embedder"))


def exported(model: LoadedModel, made: list[int], *, fails: bool = False) -> Path:
    def export(folder: Path) -> None:
        (folder / "half").write_text("x")
        if fails:
            raise ValueError("unsupported operator")
        made.append(1)
        (folder / "model.xml").write_text("x")

    return embedding_exports._exported(model, "openvino", "model.xml", export)


def test_an_export_is_made_once_and_outside_the_models_folder(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedding_exports.PACKAGES, "openvino", ("json",))
    model, before, made = LoadedModel(str(folder), "embedding"), sorted(folder.rglob("*")), list[int]()
    first, second = exported(model, made), exported(model, made)
    assert first == second
    assert first.is_relative_to(cache)
    assert made == [1]
    assert sorted(folder.rglob("*")) == before


def test_an_export_that_fails_leaves_nothing_behind(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedding_exports.PACKAGES, "openvino", ("json",))
    with pytest.raises(CannotBuild, match="unsupported operator"):
        exported(LoadedModel(str(folder), "embedding"), [], fails=True)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_candidate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedding_exports.PACKAGES, "openvino", ("json",))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CannotBuild):
        exported(LoadedModel(str(folder), "embedding"), [])


def test_other_weights_are_another_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedding_exports.PACKAGES, "onnx", ("json",))
    folder = random_bert.embedder(tmp_path / "model")
    model = LoadedModel(str(folder), "embedding")
    key = export_key(model, "onnx")
    assert export_key(model, "onnx") == key
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert export_key(model, "onnx") != key


def test_a_package_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedding_exports.PACKAGES, "onnx", ("json", "no_such_package"))
    assert not installed("onnx")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("onnx", marks=needs("onnxruntime", "onnx")),
        pytest.param("openvino", marks=needs("openvino")),
    ],
)
@pytest.mark.parametrize("kind", ["embedding", "rerank"])
def test_an_export_computes_what_torch_computes(tmp_path: Path, name: str, kind: Any) -> None:
    make = random_bert.embedder if kind == "embedding" else random_bert.cross_encoder
    model = LoadedModel(str(make(tmp_path / "model")), kind)
    tokenizer = model.tokenizer()
    texts = ["", "GPU", "the quick brown fox", "word " * 100]
    rows = [row for row, _ in (tokenizer.texts("", texts) if kind == "embedding" else tokenizer.pairs("q", texts))]
    expected = TorchPadded(model, model.most, "x").forward(rows)
    make_backend: Any = OnnxBackend if name == "onnx" else OpenVinoBackend
    options = () if name == "onnx" else ("fp32",)
    for _ in range(2):  # exported, then from the cache
        backend = make_backend(model, model.most, 2, *options)
        assert np.abs(backend.forward(rows) - expected).max() < 1e-4
    model.drop_network()
    assert np.abs(backend.forward(rows[:1]) - expected[:1]).max() < 1e-4
