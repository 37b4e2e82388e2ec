"""What is prepared at once, what in a thread of its own, and what becomes of that when nobody wants it any more."""

from __future__ import annotations

import queue
import threading
import time
from typing import ClassVar

import pytest

from tars.errors import BadGrammar, InternalError, InvalidParams, Overloaded, PromptTooLong, TarsError
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams, EmbedParams, TokenizeParams, ToolCall
from tars.workers import preparation
from tars.workers.answer_format import AnswerFormat
from tars.workers.chat_template import CHATML, ChatTemplate
from tars.workers.engine import Submission, Work
from tars.workers.preparation import (
    ABANDONED_MOST,
    APART_MOST,
    GIVE_UP_SECONDS,
    LONG_TEXT,
    Preparation,
    Prepared,
    encode,
)

LONG = "x" * (LONG_TEXT + 1)


class Vocabulary:
    """A model whose tokens are the text's bytes; `gate` holds up what is tokenized in other threads."""

    bos = 1
    eos = 2
    tokens = 256
    pieces: ClassVar[list[bytes]] = [bytes([code]) for code in range(256)]
    end_tokens = frozenset({2})

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.threads: list[threading.Thread] = []
        self.error: Exception | None = None
        self.bytes_a_token = 1
        self._main = threading.current_thread()

    def tokenize(self, text: bytes, *, add_special: bool) -> list[int]:
        if threading.current_thread() is not self._main:
            self.threads.append(threading.current_thread())
            assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return [1] * add_special + list(text)

    def fewest_tokens(self, text: bytes) -> int:
        return len(text) // self.bytes_a_token

    def special_text(self, token: int) -> str:
        return {1: "<s>", 2: "</s>"}.get(token, "")


class Prepares(Preparation):
    """With everything that it handed back."""

    def __init__(self, context: int = 100) -> None:
        self.model = Vocabulary()
        self.handed_back: queue.Queue[Prepared] = queue.Queue()
        super().__init__(
            self.model,  # type: ignore[arg-type]  # what it uses of a model
            ChatTemplate(CHATML),
            AnswerFormat.of(CHATML),
            context,
            self.handed_back.put,
        )

    def ask(self, number: int, work: Work, deadline: float | None = None) -> Prepared | None:
        return self.prepare(Submission(number, work, deadline))

    def next(self) -> Prepared:
        return self.handed_back.get(timeout=30)


@pytest.fixture
def prepares() -> Prepares:
    return Prepares()


def long() -> TokenizeParams:
    return TokenizeParams(text=LONG)


def test_short_texts_are_prepared_at_once(prepares: Prepares) -> None:
    prepared = prepares.ask(1, TokenizeParams(text="ab", add_special=True))
    assert prepared is not None
    assert (prepared.tokens, prepared.error) == ([1, 97, 98], None)
    assert prepares.busy == 0


def test_long_texts_are_prepared_in_a_thread_and_handed_back(prepares: Prepares) -> None:
    assert prepares.ask(1, long()) is None
    assert prepares.busy == 1
    assert [one.sequence for one in prepares.pending()] == [1]
    prepares.model.gate.set()
    prepared = prepares.next()
    assert len(prepared.tokens) >= len(LONG)
    assert prepares.done(prepared)
    assert prepares.busy == 0
    assert prepares.model.threads != []


def test_all_of_a_chat_counts_for_its_length() -> None:
    short = ChatMessage(role="user", content="x")
    call = ToolCall(id="1", name="f", arguments='{"a": "' + LONG + '"}')
    for message in (
        ChatMessage(role="user", content=LONG),
        ChatMessage(role="assistant", content="", reasoning=LONG),
        ChatMessage(role="assistant", content="", tool_calls=[call]),
    ):
        prepares = Prepares()
        prepares.model.gate.set()
        assert prepares.ask(1, ChatParams(messages=[short, message])) is None, message.role
        prepares.next()


def test_so_many_run_beside_each_other_and_the_others_wait_in_order(prepares: Prepares) -> None:
    for number in range(APART_MOST + 3):
        assert prepares.ask(number, long()) is None
    assert prepares.busy == APART_MOST + 3
    prepares.model.gate.set()
    numbers = []
    for _ in range(APART_MOST + 3):
        prepared = prepares.next()
        numbers.append(prepared.submission.sequence)
        assert prepares.done(prepared)
    assert sorted(numbers) == list(range(APART_MOST + 3))
    assert prepares.busy == 0


def test_what_comes_late_for_a_call_that_is_over_is_not_wanted(prepares: Prepares) -> None:
    prepares.ask(1, long())
    assert prepares.drop(1)
    assert not prepares.drop(1)
    assert prepares.busy == 0
    prepares.model.gate.set()
    assert not prepares.done(prepares.next())


def test_a_call_that_waits_its_turn_can_be_dropped_and_is_never_begun(prepares: Prepares) -> None:
    for number in range(APART_MOST + 2):
        prepares.ask(number, long())
    assert prepares.drop(APART_MOST)
    assert prepares.busy == APART_MOST + 1
    prepares.model.gate.set()
    begun = set()
    for _ in range(APART_MOST + 1):
        prepared = prepares.next()
        begun.add(prepared.submission.sequence)
        prepares.done(prepared)
    assert APART_MOST not in begun
    assert prepares.busy == 0


def test_what_takes_too_long_is_given_up_and_a_place_is_free(prepares: Prepares) -> None:
    for number in range(APART_MOST + 1):
        prepares.ask(number, long())
    began = time.monotonic()
    assert prepares.late(began) == []
    ended = prepares.late(began + GIVE_UP_SECONDS + 1)
    assert [number for number, _ in ended] == list(range(APART_MOST))
    assert all(isinstance(error, InvalidParams) for _, error in ended)
    prepares.model.gate.set()


def test_while_too_many_abandoned_threads_run_nothing_more_is_begun(prepares: Prepares) -> None:
    for number in range(ABANDONED_MOST):
        prepares.ask(number, long())
        prepares.drop(number)
    assert prepares.ask(77, long()) is None
    prepared = prepares.next()
    assert isinstance(prepared.error, Overloaded)
    assert prepared.error.retryable
    assert prepares.done(prepared)
    # They end by themselves, and then it goes on.
    prepares.model.gate.set()
    for thread in prepares.model.threads:
        thread.join(30)
    for _ in range(ABANDONED_MOST):
        assert not prepares.done(prepares.next())
    assert prepares.ask(78, long()) is None
    assert prepares.next().error is None


def test_a_call_refused_for_abandoned_threads_may_be_cancelled_before_its_refusal_is_read(prepares: Prepares) -> None:
    for number in range(ABANDONED_MOST):
        prepares.ask(number, long())
        prepares.drop(number)
    prepares.ask(77, long())
    assert prepares.drop(77)
    assert not prepares.done(prepares.next())
    assert prepares.busy == 0
    prepares.model.gate.set()


def test_a_thread_that_cannot_be_started_fails_its_call_only(
    prepares: Prepares, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = threading.stack_size()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert prepares.ask(1, long()) is None
    assert threading.stack_size() == before
    prepared = prepares.next()
    assert isinstance(prepared.error, Overloaded)
    assert prepares.done(prepared)
    assert prepares.busy == 0
    prepares.model.gate.set()
    assert prepares.ask(2, long()) is None
    assert prepares.next().error is None


def test_whatever_a_text_provokes_ends_its_call_only(prepares: Prepares, capsys: pytest.CaptureFixture[str]) -> None:
    prepares.model.error = RecursionError("deep")
    prepared = prepares.ask(1, TokenizeParams(text="x"))
    assert prepared is not None
    assert isinstance(prepared.error, InternalError)
    assert "RecursionError" in capsys.readouterr().err
    prepares.model.gate.set()
    prepares.ask(2, long())
    assert isinstance(prepares.next().error, InternalError)


def test_half_a_surrogate_pair_is_a_question_mark() -> None:
    assert encode("a\ud800b") == b"a?b"


def test_what_this_engine_does_not_serve_takes_no_thread() -> None:
    assert not preparation._takes_long(Submission(1, EmbedParams(input=LONG), None))


@pytest.mark.model  # the sampling's grammars import llama.cpp
class TestGenerations:
    def test_a_prompt_is_rendered_and_tokenized(self, prepares: Prepares) -> None:
        prepared = prepares.ask(1, ChatParams(messages=[ChatMessage(role="user", content="hi")]))
        assert prepared is not None
        text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert prepared.tokens == [1, *text.encode()]
        assert prepared.prompt_end == text

    def test_a_prompt_as_long_as_the_context_leaves_no_room_for_an_answer(self, prepares: Prepares) -> None:
        fits = prepares.ask(1, CompleteParams(prompt="x" * 98))
        assert fits is not None
        assert (fits.error, len(fits.tokens)) == (None, 99)
        prepares.model.bytes_a_token = 10
        for length in (99, 100, 1001):
            refused = prepares.ask(2, CompleteParams(prompt="x" * length))
            assert refused is not None
            assert isinstance(refused.error, PromptTooLong), length

    def test_no_second_token_of_beginning_where_the_template_writes_it(self) -> None:
        prepares = Prepares()
        prepares._template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", "<s>", "</s>")
        prepared = prepares.ask(1, ChatParams(messages=[ChatMessage(role="user", content="hi")]))
        assert prepared is not None
        assert prepared.tokens == list(b"<s>hi")

    def test_an_empty_prompt_is_the_token_of_beginning_or_an_error(self, prepares: Prepares) -> None:
        prepares.model.tokenize = lambda text, *, add_special: []  # type: ignore[method-assign]  # a model that adds none
        prepared = prepares.ask(1, CompleteParams(prompt=""))
        assert prepared is not None
        assert prepared.tokens == [1]
        prepares.model.bos = -1
        prepared = prepares.ask(1, CompleteParams(prompt=""))
        assert prepared is not None
        assert isinstance(prepared.error, InvalidParams)

    @pytest.mark.parametrize("params", [{"grammar": 'root ::= "a" missing'}, {"json_schema": {"type": "nonsense"}}])
    def test_a_bad_grammar_is_found_apart(self, params: dict[str, object]) -> None:
        prepares = Prepares(1000)
        prepares.model.gate.set()
        assert prepares.ask(1, CompleteParams.model_validate({"prompt": "x", **params})) is None
        error = prepares.next().error
        assert isinstance(error, BadGrammar | InvalidParams)
        assert isinstance(error, TarsError)

    def test_a_grammar_that_takes_too_long_is_said_to_be_the_grammar(self, prepares: Prepares) -> None:
        prepares.ask(1, CompleteParams(prompt="x", grammar='root ::= "a"'))
        ((_, error),) = prepares.late(time.monotonic() + GIVE_UP_SECONDS + 1)
        assert isinstance(error, BadGrammar)
        prepares.model.gate.set()
