"""The reading thread's steps, taken one by one in this thread."""

from __future__ import annotations

from typing import Any

import pytest
from word_tokenizer import PAD, word_tokenizer

pytest.importorskip("tokenizers")
from tars.errors import Cancelled, InvalidParams, PromptTooLong, WrongModelKind
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    EmbedParams,
    RerankParams,
    Tokenized,
    TokenizeParams,
)
from tars.workers.embedding_intake import AT_ONCE_CHARACTERS, CHUNK, Intake
from tars.workers.embedding_pool import TextPool
from tars.workers.embedding_tokenizer import TextTokenizer
from tars.workers.engine import Submission, Work
from tars.workers.inbox import Inbox


class Desk:
    """An intake whose steps the test takes."""

    def __init__(self, kind: str = "embedding", most: int = 6) -> None:
        self.inbox = Inbox()
        self.pool = TextPool()
        self.told: list[tuple[int, Any]] = []
        self.intake = Intake(
            self.inbox,
            self.pool,
            TextTokenizer(word_tokenizer(), most, PAD),
            self.told.extend,
            kind=kind,
            dimensions=8,
            prompts={"query": "query: "},
            default_prompt=None,
        )

    def put(self, number: int, work: Work) -> None:
        self.inbox.put(Submission(number, work, None))

    def waiting(self) -> list[tuple[int, int, int]]:
        batch = self.pool.take(lambda lengths: range(len(lengths)))
        return [(item.call.number, item.index, len(item.row)) for item in batch]


def test_a_calls_time_runs_from_when_it_came_and_not_from_when_it_was_read() -> None:
    desk = Desk()
    desk.inbox.put(Submission(1, EmbedParams(input="a"), None, received=5.0))
    desk.intake.step()
    (item,) = desk.pool.take(lambda lengths: range(len(lengths)))
    assert item.call.received == 5.0


def test_a_large_call_is_read_in_turns_with_the_others() -> None:
    desk = Desk()
    desk.put(1, EmbedParams(input=["a"] * (CHUNK + 10)))
    desk.put(2, EmbedParams(input="b"))
    desk.intake.step()
    assert {number for number, _, _ in desk.waiting()} == {1}
    desk.intake.step()
    assert desk.waiting() == [(2, 0, 3)]
    desk.intake.step()
    assert len(desk.waiting()) == 10
    assert desk.intake.prompt_tokens == 3 * (CHUNK + 11)


def test_a_refused_call_never_reaches_the_model_and_names_all_its_long_texts() -> None:
    desk = Desk()
    texts = ["a"] * (2 * CHUNK)
    texts[3] = texts[CHUNK + 5] = "a b c a b"
    desk.put(1, EmbedParams(input=texts, truncate=False))
    desk.intake.step()
    assert desk.waiting() == []
    desk.intake.step()
    ((number, error),) = desk.told
    assert number == 1
    assert isinstance(error, PromptTooLong)
    assert error.details["texts"] == [3, CHUNK + 5]
    assert desk.waiting() == []


def test_a_long_text_is_cut_or_split() -> None:
    desk = Desk()
    desk.put(1, EmbedParams(input=["a", "a b c a b"]))
    desk.intake.step()
    assert desk.waiting() == [(1, 0, 3), (1, 1, 6)]
    desk.put(2, EmbedParams(input=["a b c a b", "a"], overflow="mean"))
    desk.intake.step()
    batch = desk.pool.take(lambda lengths: range(len(lengths)))
    assert [(item.index, item.piece, len(item.row)) for item in batch] == [(0, 0, 6), (0, 1, 3), (1, 0, 3)]
    assert (batch[0].call.split, batch[0].call.truncated) == ([0], [])


def test_a_cancelled_call_ends_at_once_and_its_texts_go() -> None:
    desk = Desk()
    desk.put(1, EmbedParams(input=["a"] * (3 * CHUNK)))
    desk.intake.step()
    desk.inbox.cancel(1)
    desk.intake.step()
    ((number, error),) = desk.told
    assert (number, type(error)) == (1, Cancelled)
    assert desk.waiting() == []
    desk.put(2, TokenizeParams(text="a"))  # what was left of call 1 is not read any more
    desk.intake.step()
    assert isinstance(desk.told[1][1], Tokenized)
    assert desk.waiting() == []


def test_the_prefix_is_the_calls() -> None:
    desk = Desk()
    desk.put(1, EmbedParams(input="a", input_type="query"))
    desk.intake.step()
    assert desk.waiting() == [(1, 0, 5)]


def test_a_pair_is_a_row() -> None:
    desk = Desk("rerank", most=8)
    desk.put(1, RerankParams(query="a", documents=["b", "b " * 20]))
    desk.intake.step()
    assert desk.waiting() == [(1, 0, 5), (1, 1, 8)]
    desk.put(2, RerankParams(query="a", documents=["b", "b " * 20], truncate=False))
    desk.intake.step()
    assert isinstance(desk.told[0][1], PromptTooLong)


@pytest.mark.parametrize(
    ("kind", "work", "error"),
    [
        ("embedding", RerankParams(query="a", documents=["b"]), WrongModelKind),
        ("rerank", EmbedParams(input="a"), WrongModelKind),
        ("embedding", ChatParams(messages=[ChatMessage(role="user", content="a")]), WrongModelKind),
        ("embedding", EmbedParams(input="a", dimensions=9), InvalidParams),
    ],
)
def test_what_the_model_cannot_do_is_refused(kind: str, work: Work, error: type[Exception]) -> None:
    desk = Desk(kind)
    desk.put(1, work)
    desk.intake.step()
    assert [(number, type(told)) for number, told in desk.told] == [(1, error)]


def test_a_lone_short_text_is_read_where_it_arrives() -> None:
    desk = Desk()
    assert desk.intake.read_at_once(Submission(1, EmbedParams(input=["a b"]), None))
    assert desk.waiting() == [(1, 0, 4)]
    assert desk.intake.prompt_tokens == 4
    desk.pool.end(1)
    assert desk.intake.read_at_once(Submission(2, EmbedParams(input="a", dimensions=9), None))
    assert [(number, type(told)) for number, told in desk.told] == [(2, InvalidParams)]


@pytest.mark.parametrize(
    "work",
    [
        EmbedParams(input=["a", "b"]),
        EmbedParams(input="a" * (AT_ONCE_CHARACTERS + 1)),
        EmbedParams(input="a", prompt="b" * AT_ONCE_CHARACTERS),
        EmbedParams(input="a", overflow="mean"),
        TokenizeParams(text="a"),
    ],
)
def test_whatever_may_take_long_is_left_to_the_reading_thread(work: Work) -> None:
    desk = Desk()
    assert not desk.intake.read_at_once(Submission(1, work, None))
    assert (desk.waiting(), desk.told) == ([], [])


def test_a_text_that_meets_others_goes_the_way_of_the_others() -> None:
    desk = Desk()
    desk.put(1, EmbedParams(input="a"))
    desk.intake.step()
    assert not desk.intake.read_at_once(Submission(2, EmbedParams(input="b"), None))
    desk.waiting()
    assert not desk.intake.read_at_once(Submission(2, EmbedParams(input="b"), None))  # computed just now
    desk.pool.end(1)
    assert desk.intake.read_at_once(Submission(2, EmbedParams(input="b"), None))


def test_a_fault_while_it_is_read_at_once_takes_the_engine_along() -> None:
    desk = Desk()
    desk.intake._tokenizer = None  # type: ignore[assignment]  # a bug, as it were
    assert desk.intake.read_at_once(Submission(1, EmbedParams(input="a"), None))
    with pytest.raises(AttributeError):
        desk.pool.wait()


def test_a_reader_that_dies_takes_the_engine_along() -> None:
    desk = Desk()
    desk.intake._tokenizer = None  # type: ignore[assignment]  # a bug, as it were
    thread = desk.intake.start()
    desk.put(1, EmbedParams(input="a"))
    with pytest.raises(AttributeError):
        desk.pool.wait()
    thread.join(10)


def test_the_end_of_the_inbox_is_the_pools_end() -> None:
    desk = Desk()
    thread = desk.intake.start()
    desk.inbox.close()
    assert desk.pool.wait() is False
    thread.join(10)


BOOK = "a b c " * 20000
"""More than seven windows."""


@pytest.mark.parametrize(
    "work", [TokenizeParams(text=BOOK), EmbedParams(input=BOOK, overflow="mean")], ids=["tokenize", "mean"]
)
def test_a_book_lets_the_others_have_their_turns(work: Work) -> None:
    desk = Desk()
    desk.put(1, work)
    desk.put(2, EmbedParams(input="b"))
    desk.intake.step()
    desk.intake.step()
    assert desk.waiting() == [(2, 0, 3)]
    assert desk.told == []
    while desk.intake._reading:
        desk.intake.step()
    if isinstance(work, TokenizeParams):
        ((number, answer),) = desk.told
        assert (number, len(answer.tokens)) == (1, 60002)
    else:
        pieces = 0
        while rows := desk.waiting():
            pieces += len(rows)
        assert pieces == 15000


@pytest.mark.parametrize(
    "work", [TokenizeParams(text=BOOK), EmbedParams(input=BOOK, overflow="mean")], ids=["tokenize", "mean"]
)
def test_a_book_that_nobody_wants_any_more_is_not_read_on(work: Work) -> None:
    desk = Desk()
    desk.put(1, work)
    desk.intake.step()
    desk.inbox.cancel(1)
    desk.intake.step()
    assert not desk.intake._reading
    ((number, error),) = desk.told
    assert number == 1
    assert isinstance(error, Cancelled)
    assert desk.waiting() == []
