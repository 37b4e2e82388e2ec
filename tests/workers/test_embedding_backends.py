"""Padded and packed batches of random BERTs against each text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import random_bert

from tars.errors import InternalError

np = pytest.importorskip("numpy")
from tars.workers.embedding_backends import CannotBuild, TorchPacked, TorchPadded, finite, rectangle  # noqa: E402
from tars.workers.embedding_model import LoadedModel  # noqa: E402
from tars.workers.embedding_tokenizer import Row  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

TEXTS = ["", "a", "the quick brown fox", "word " * 30, "x y " * 100, "Größe 日本語"]


@pytest.fixture(scope="module", params=["embedding", "rerank"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, list[Row]]:
    folder = tmp_path_factory.mktemp(request.param)
    make = random_bert.embedder if request.param == "embedding" else random_bert.cross_encoder
    model = LoadedModel(str(make(folder)), request.param)
    tokenizer = model.tokenizer()
    rows = tokenizer.texts("", TEXTS) if model.kind == "embedding" else tokenizer.pairs("the query", TEXTS)
    return model, [row for row, _ in rows]


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_company_changes_nothing(loaded: tuple[LoadedModel, list[Row]], form: str) -> None:
    model, rows = loaded
    alone = np.concatenate([TorchPadded(model, model.most, "torch-fp32").forward([row]) for row in rows])
    backend: Any = TorchPadded(model, model.most, "x") if form == "padded" else TorchPacked(model, "x")
    together = backend.forward(rows)
    assert together.dtype == np.float32
    assert together.shape == alone.shape
    assert np.abs(together - alone).max() < 1e-5
    # The texts differ, so that a mix-up would show.
    assert np.abs(alone[0] - alone[4]).max() > 1e-3


def test_what_is_computed_is_told(loaded: tuple[LoadedModel, list[Row]]) -> None:
    model, _ = loaded
    assert TorchPacked(model, "x").cost([5, 20]) == 25
    assert TorchPadded(model, model.most, "x").cost([5, 20]) == 64


def test_tokens_of_a_prompt_can_be_left_out_of_the_average(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = str(random_bert.embedder(tmp_path, include_prompt=False))
    theirs = SentenceTransformer(folder, device="cpu", local_files_only=True).encode(
        ["one text", "another, longer text"], prompt="query: ", normalize_embeddings=True, show_progress_bar=False
    )
    model = LoadedModel(folder, "embedding")
    rows = [row for row, _ in model.tokenizer().texts("query: ", ["one text", "another, longer text"])]
    for backend in (TorchPadded(model, model.most, "x"), TorchPacked(model, "x")):
        assert np.abs(backend.forward(rows) - theirs).max() < 1e-5


def test_another_family_is_not_packed(loaded: tuple[LoadedModel, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded[0], "architecture", "modernbert")
    with pytest.raises(CannotBuild, match="modernbert"):
        TorchPacked(loaded[0], "x")


def test_a_rectangle_is_padded_to_sixteen() -> None:
    ones = np.ones(3, dtype=np.int64)
    ids, mask, types = rectangle([Row(ones * 7, ones), Row(ones[:1] * 8, ones[:1] * 0)], 5, 64)
    assert ids.shape == (2, 16)
    assert ids[1].tolist() == [8, *[5] * 15]
    assert mask.sum(axis=1).tolist() == [3, 1]
    assert types[0, :4].tolist() == [1, 1, 1, 0]


def test_what_is_not_a_number_is_an_error() -> None:
    with pytest.raises(InternalError, match="not a number"):
        finite(np.array([[np.nan]], dtype=np.float32))
