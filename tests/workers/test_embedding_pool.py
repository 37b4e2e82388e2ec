from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

np = pytest.importorskip("numpy")
from tars.messages.inference import EmbedParams, RerankParams  # noqa: E402  # the pool needs numpy
from tars.workers.embedding_pool import WINDOW, Call, Item, TextPool  # noqa: E402
from tars.workers.embedding_tokenizer import Row  # noqa: E402


def row(length: int = 3) -> Row:
    ids = np.zeros(length, dtype=np.int64)
    return Row(ids, ids)


def opened(pool: TextPool, number: int, texts: int, deadline: float | None = None) -> list[Item]:
    call = Call(number, EmbedParams(input=["x"] * texts), deadline, 0.0, 2)
    pool.open(call)
    items = [Item(call, index, row()) for index in range(texts)]
    pool.add(items)
    return items


def taken(pool: TextPool, count: int) -> list[tuple[int, int]]:
    return [(item.call.number, item.index) for item in pool.take(lambda lengths: range(min(count, len(lengths))))]


def test_callers_take_turns() -> None:
    pool = TextPool()
    opened(pool, 1, 6)
    opened(pool, 2, 1)
    opened(pool, 3, 2)
    assert taken(pool, 4) == [(1, 0), (2, 0), (3, 0), (1, 1)]
    assert taken(pool, 2) == [(1, 2), (3, 1)]


def test_a_call_that_was_served_goes_behind_the_others() -> None:
    pool = TextPool()
    opened(pool, 1, 5)
    opened(pool, 2, 5)
    assert [taken(pool, 1)[0][0] for _ in range(4)] == [1, 2, 1, 2]


def test_an_ended_call_is_answered_once_and_its_texts_go() -> None:
    pool = TextPool()
    items = opened(pool, 1, 3)
    opened(pool, 2, 1)
    assert pool.end(1) is items[0].call
    assert pool.end(1) is None
    assert not pool.is_empty()
    pool.add(items)  # the tokenizer was at work on them still
    assert taken(pool, 9) == [(2, 0)]
    assert not pool.is_open(items[0].call)
    assert not pool.is_empty()  # its text was taken, and nobody has answered yet
    pool.end(2)
    assert pool.is_empty()


def test_a_batch_that_is_put_back_comes_first_again() -> None:
    pool = TextPool()
    opened(pool, 1, 2)
    opened(pool, 2, 2)
    batch = pool.take(lambda lengths: range(2))
    pool.put_back(batch)
    assert taken(pool, 2) == [(1, 0), (2, 0)]


def test_the_window_is_bounded() -> None:
    pool = TextPool()
    opened(pool, 1, WINDOW * 2)
    seen: list[int] = []

    def select(lengths: Sequence[int]) -> list[int]:
        seen.append(len(lengths))
        return [0]

    pool.take(select)
    assert seen == [WINDOW]


def test_expired_calls_and_counts() -> None:
    pool = TextPool()
    opened(pool, 1, 3, deadline=5.0)
    opened(pool, 2, 1)
    assert pool.expired(4.9) == []
    assert pool.expired(5.0) == [1]
    assert pool.counts() == (0, 4)
    taken(pool, 2)
    assert pool.counts() == (2, 2)
    pool.done()
    assert pool.counts()[0] == 0


def test_waiting_ends_with_work_or_with_the_end_or_with_the_readers_failure() -> None:
    pool = TextPool()
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(pool.wait()))
    thread.start()
    opened(pool, 1, 1)
    thread.join(10)
    pool.close()
    assert [*answers, pool.wait()] == [True, False]
    broken = TextPool()
    broken.fail(ValueError("reader"))
    with pytest.raises(ValueError, match="reader"):
        broken.wait()


def test_a_split_text_has_a_vector_when_all_its_pieces_have() -> None:
    call = Call(1, EmbedParams(input="long"), None, 0.0, 2)
    call.split_text(0, [3, 4])
    one, other = np.array([1, 0], dtype=np.float32), np.array([0, 1], dtype=np.float32)
    assert call.vector_of(0, 1, other) is None
    assert call.vector_of(0, 0, one) == pytest.approx([0.6, 0.8])
    assert call.split == [0]


def test_a_rerank_calls_texts_are_its_documents() -> None:
    assert Call(1, RerankParams(query="q", documents=["a", "b"]), None, 0.0).left == 2
