"""What a caller sees of an answer's tokens, and that an answer which is broken off anywhere goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tars.errors import Cancelled, DeadlineExceeded, InvalidParams, StaleRoute
from tars.messages.inference import ChatMessage, ChatParams, CompleteParams, Delta, TokenLogprob, Tool
from tars.workers.answer_format import AnswerFormat
from tars.workers.engine import Resume, Submission
from tars.workers.generation import SEEDS, Answer, Call, ending_error

PIECES = [
    b"a",
    b"b",
    b"ab",
    b" ",
    b"\xf0\x9f",
    b"\x99\x82",
    b"\xe2\x82",
    b"\xac",
    b"X",
    b"XY",
    b"YZ",
    b"",
    b"<",
    b"think",
]
PIECES += [b"<tool_call>", b'\n{"name": "now", "arguments": {}}', b"\n</tool_call>", b"</think>"]
"""A vocabulary: parts of characters, beginnings of stop strings, marks of thoughts and calls."""

MARKED = AnswerFormat.of(
    '<think></think><tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
PLAIN = AnswerFormat.of(None)
PROMPT = [7, 7, 7]


def call_of(
    *,
    resume: Resume | None = None,
    chat: bool = False,
    seed: int = 3,
    context: int = 100,
    deadline: float | None = None,
    **params: object,
) -> Call:
    work: ChatParams | CompleteParams = (
        CompleteParams.model_validate({"prompt": "x", **params})
        if not chat
        else (
            ChatParams.model_validate(
                {"messages": [ChatMessage(role="user", content="x")], "tools": [Tool(name="now")], **params}
            )
        )
    )
    submission = Submission(9, work, deadline, resume, received=10.0)
    return Call(submission, PROMPT, seed=seed, context=context, answers=MARKED if chat else PLAIN)


def run(answer: Answer, tokens: Sequence[int], *, to_the_end: bool) -> list[Delta]:
    """Give an answer its tokens until it ends; after the last one the model ends it, where `to_the_end`."""
    deltas = []
    for token in tokens:
        if answer.finish_reason is not None:
            break
        deltas.append(answer.accept(token, PIECES[token], None))
    if to_the_end and answer.finish_reason is None:
        deltas.append(answer.finish("stop"))
    return [delta for delta in deltas if delta is not None]


def seen(deltas: Sequence[Delta]) -> tuple[str, str, list[int], list[tuple[str | None, str]]]:
    """All that a caller has after these."""
    calls = [(call.name, call.arguments) for delta in deltas for call in delta.tool_calls]
    tokens = [token for delta in deltas for token in delta.token_ids]
    return "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas), tokens, calls


@settings(max_examples=4 * settings().max_examples)
@example(tokens=[0, 8], stop=["XYZ"], most=2, broken_at=2, shown_share=0.0, chat=False)
@example(tokens=[0, 12, 0], stop=[], most=2, broken_at=2, shown_share=0.5, chat=True)
@example(tokens=[0, 12, 0], stop=[], most=2, broken_at=2, shown_share=1.0, chat=True)
@example(tokens=[0, 14, 15, 9, 10], stop=["XYZ"], most=9, broken_at=5, shown_share=0.0, chat=True)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=25),
    stop=st.lists(st.sampled_from(["XYZ", "🙂a", "aba", "€"]), max_size=2),
    most=st.integers(1, 30),
    broken_at=st.integers(0, 25),
    shown_share=st.floats(0, 1),
    chat=st.booleans(),
)
def test_an_answer_broken_off_anywhere_goes_on_without_a_lost_or_doubled_token(
    tokens: list[int], stop: list[str], most: int, broken_at: int, shown_share: float, chat: bool
) -> None:
    params = {"stop": stop, "max_tokens": most, "chat": chat}
    whole = call_of(**params).answers[0]
    wanted = seen(run(whole, tokens, to_the_end=True))

    first = call_of(**params).answers[0]
    before = run(first, tokens[:broken_at], to_the_end=False)
    had = first.tokens[len(PROMPT) :]
    before = before[: round(shown_share * len(before))]
    handed_out = sum(len(delta.token_ids) for delta in before)

    ended = [0] if any(delta.ended for delta in before) else []
    resume = Resume(generated=[had], handed_out=[handed_out], ended=ended, seed=3)
    again = call_of(resume=resume, **params).answers[0]
    shown = again.replay(PIECES)
    after = [] if shown is None else [shown]
    after += run(again, tokens[len(had) :], to_the_end=True)

    assert again.choice() == whole.choice()
    assert again.tokens == whole.tokens
    text, reasoning, shown_tokens, calls = (one + other for one, other in zip(seen(before), seen(after), strict=True))
    assert shown_tokens == wanted[2]
    assert (text, reasoning, calls) == (wanted[0], wanted[1], wanted[3])


class Gateway:
    """What is known where the caller is: the tokens that came, and whether the answer's last piece was among it."""

    def __init__(self, index: int = 0) -> None:
        self.deltas: list[Delta] = []
        self.index = index

    def take(self, deltas: Sequence[Delta]) -> None:
        assert not (deltas and self.ended), "nothing comes after the last piece"
        self.deltas += deltas

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def ended(self) -> bool:
        return any(delta.ended for delta in self.deltas)


@settings(max_examples=4 * settings().max_examples)
@example(tokens=[8, 2, 0], stop=["XYZ"], most=9, breaks=[1, 1], chat=False, n=1)
@example(tokens=[0, 8], stop=["XYZ"], most=9, breaks=[99], chat=False, n=1)
@example(tokens=[0, 12], stop=[], most=9, breaks=[99], chat=True, n=1)
@example(tokens=[], stop=[], most=9, breaks=[0], chat=False, n=2)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=25),
    stop=st.lists(st.sampled_from(["XYZ", "🙂a", "aba", "€"]), max_size=2),
    most=st.integers(1, 30),
    breaks=st.lists(st.integers(0, 30), max_size=4),
    chat=st.booleans(),
    n=st.integers(1, 3),
)
def test_several_breaks_of_which_only_the_callers_tokens_are_known_lose_and_double_nothing(
    tokens: list[int], stop: list[str], most: int, breaks: list[int], chat: bool, n: int
) -> None:
    """`breaks`: how many pieces of the stream come before each break. Every answer has other tokens: its number shifts them."""
    params = {"stop": stop, "max_tokens": most, "chat": chat, "n": n}

    def of(index: int) -> list[int]:
        return [(token + index) % len(PIECES) for token in tokens]

    whole = call_of(**params)
    wanted = [seen(run(answer, of(answer.index), to_the_end=True)) for answer in whole.answers]

    gateways = [Gateway(index) for index in range(n)]
    last: Call | None = None
    for pieces in [*breaks, None]:
        resume = Resume(
            generated=[gateway.tokens for gateway in gateways],
            handed_out=[len(gateway.tokens) for gateway in gateways],
            ended=[gateway.index for gateway in gateways if gateway.ended],
            seed=3,
        )
        last = call_of(resume=resume, **params)
        for answer, gateway in zip(last.answers, gateways, strict=True):
            shown = answer.replay(PIECES)
            assert shown is None, "all of it was handed out"
            came = run(answer, of(answer.index)[answer.generated :], to_the_end=True)
            gateway.take(came if pieces is None else came[:pieces])
    assert last is not None
    assert [answer.choice() for answer in last.answers] == [answer.choice() for answer in whole.answers]
    assert [seen(gateway.deltas) for gateway in gateways] == wanted
    if n > 1:
        assert all(gateway.ended for gateway in gateways)
    assert last.result(20.0).usage == whole.result(20.0).usage


@pytest.mark.parametrize(("then", "text"), [([10], "aXYZ"), ([0], "aXa")])
def test_what_was_shown_stays_where_another_token_comes_than_the_one_that_made_it_certain(
    then: list[int], text: str
) -> None:
    first = call_of(stop=["XYZ"]).answers[0]
    # "X" was held back until "ab" had made it certain, of which "b..." is still held: the caller has "aX".
    shown = run(first, [0, 8, 0], to_the_end=False)
    assert seen(shown)[0] == "aXa"
    again = call_of(stop=["XYZ"], resume=Resume(generated=[[0, 8]], handed_out=[2], seed=3)).answers[0]
    assert again.replay(PIECES) is None
    after = run(again, then, to_the_end=True)
    assert "aX" + seen(after)[0] == again.choice().text == text
    # Broken a second time it still reads so, although a stop string stands in it now.
    third = call_of(stop=["XYZ"], resume=Resume(generated=[[0, 8, *then]], handed_out=[2 + len(then)], seed=3)).answers[
        0
    ]
    assert third.replay(PIECES) is None
    run(third, [0], to_the_end=True)
    assert third.choice().text == text + "a"


@pytest.mark.parametrize(
    "resume",
    [
        Resume(generated=[[1]], handed_out=[1], seed=1),
        Resume(generated=[[1], [1], [1]], handed_out=[1, 1, 1], seed=1),
        Resume(generated=[[1], [1]], handed_out=[1], seed=1),
        Resume(generated=[[1], [1]], handed_out=[2, 1], seed=1),
        Resume(generated=[[1], [1]], handed_out=[-1, 1], seed=1),
        Resume(generated=[[1], [1]], handed_out=[1, 1], ended=[2], seed=1),
    ],
)
def test_a_continuation_that_does_not_fit_its_call_is_refused(resume: Resume) -> None:
    with pytest.raises(InvalidParams, match="does not fit the call"):
        call_of(n=2, resume=resume)


def test_an_answer_longer_than_this_replicas_context_goes_on_elsewhere_and_is_not_cut() -> None:
    tokens = [0] * 5
    with pytest.raises(StaleRoute, match="context") as refused:
        call_of(context=len(PROMPT) + 5, resume=Resume(generated=[tokens], handed_out=[5], seed=3))
    assert refused.value.retryable
    whole = Resume(generated=[tokens], handed_out=[5], ended=[0], seed=3)
    ended = call_of(context=len(PROMPT) + 5, resume=whole).answers[0]
    assert ended.replay(PIECES) is None
    assert ended.choice().finish_reason == "length"


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=25), st.lists(st.sampled_from(["XYZ", "aba"]), max_size=2))
def test_deltas_make_the_result(tokens: list[int], stop: list[str]) -> None:
    answer = call_of(stop=stop, max_tokens=30).answers[0]
    text, _, shown, _ = seen(run(answer, tokens, to_the_end=True))
    assert text == answer.choice().text
    assert shown == answer.tokens[len(PROMPT) :]


def test_nothing_is_replayed_twice_at_the_border_of_what_was_handed_out() -> None:
    tokens = [0, 1, 2]
    for handed_out, expected in ((0, "abab"), (1, "bab"), (2, "ab"), (3, None)):
        answer = call_of(resume=Resume(generated=[tokens], handed_out=[handed_out], seed=3)).answers[0]
        shown = answer.replay(PIECES)
        assert (None if shown is None else shown.text) == expected
        assert (None if shown is None else shown.token_ids) == (tokens[handed_out:] or None)


def test_finish_reasons() -> None:
    answer = call_of(max_tokens=2).answers[0]
    run(answer, [0, 0, 0], to_the_end=False)
    assert (answer.choice().finish_reason, answer.generated) == ("length", 2)
    answer = call_of(stop=["XYZ"]).answers[0]
    run(answer, [0, 8, 10, 0], to_the_end=False)
    assert (answer.choice().finish_reason, answer.choice().text, answer.generated) == ("stop", "a", 3)
    answer = call_of().answers[0]
    run(answer, [0], to_the_end=True)
    assert answer.choice().finish_reason == "stop"
    # What the context leaves is a bound too.
    answer = call_of(context=len(PROMPT) + 1).answers[0]
    run(answer, [0, 0], to_the_end=False)
    assert (answer.choice().finish_reason, answer.generated) == ("length", 1)


def test_calls_of_tools_end_with_their_own_reason_but_not_where_the_room_ended() -> None:
    call = [0, 14, 15, 16]
    answer = call_of(chat=True).answers[0]
    run(answer, call, to_the_end=True)
    assert answer.choice().finish_reason == "tool_calls"
    assert [one.name for one in answer.choice().tool_calls] == ["now"]
    answer = call_of(chat=True, max_tokens=4).answers[0]
    run(answer, call, to_the_end=True)
    assert (answer.choice().finish_reason, len(answer.choice().tool_calls)) == ("length", 1)
    # A call that was cut off is the text that it is.
    answer = call_of(chat=True, max_tokens=2).answers[0]
    run(answer, call, to_the_end=True)
    assert answer.choice().tool_calls == []
    assert answer.choice().text == "".join(PIECES[token].decode() for token in call[:2])


def test_several_answers_have_seeds_of_their_own_and_one_result() -> None:
    call = call_of(n=3, seed=SEEDS - 1)
    assert [answer.seed for answer in call.answers] == [SEEDS - 1, 0, 1]
    for index, answer in enumerate(call.answers):
        assert not call.ended
        run(answer, [index] * (index + 1), to_the_end=True)
    assert call.ended
    result = call.result(12.0)
    assert [result.text, *(choice.text for choice in result.further)] == ["a", "bb", "ababab"]
    assert [choice.index for choice in result.further] == [1, 2]
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (3, 6, 9)
    assert result.seed == SEEDS - 1
    assert {delta.index for delta in run(call_of(n=2).answers[1], [0], to_the_end=True)} == {1}


def test_times_of_a_result() -> None:
    call = call_of()
    answer = call.answers[0]
    answer.started, answer.first_token, answer.cached = 11.0, 12.0, 2
    run(answer, [0] * 5, to_the_end=True)
    result = call.result(14.0)
    timings = result.timings
    assert (timings.queue_ms, timings.first_token_ms, timings.total_ms) == (1000, 2000, 4000)
    assert timings.tokens_per_second == 2.0
    assert result.usage.cached_tokens == 2


def test_what_was_replayed_is_counted_but_not_as_speed() -> None:
    call = call_of(resume=Resume(generated=[[0] * 4], handed_out=[4], seed=3))
    answer = call.answers[0]
    assert answer.replay(PIECES) is None
    answer.started, answer.first_token = 11.0, 12.0
    run(answer, [0] * 3, to_the_end=True)
    result = call.result(13.0)
    assert result.usage.completion_tokens == 7
    assert result.timings.tokens_per_second == 2.0
    assert result.text == "a" * 7


def test_log_probabilities_travel_with_their_tokens() -> None:
    call = call_of(logprobs=0, stop=["XYZ"])
    answer = call.answers[0]
    deltas = []
    for token in (8, 8, 0):
        logprob = TokenLogprob(token="?", token_id=token, logprob=-1.0)
        if (delta := answer.accept(token, PIECES[token], logprob)) is not None:
            deltas.append(delta)
    answer.finish("stop")
    told = [one.token_id for delta in deltas for one in delta.logprobs or []]
    assert told == [8, 8, 0] == [token for delta in deltas for token in delta.token_ids]
    assert [one.token_id for one in answer.choice().logprobs or []] == [8, 8, 0]
    assert call_of().answers[0].accept(0, b"a", None) == Delta(text="a", token_ids=[0])
    assert call_of(logprobs=None).answers[0].accept(0, b"a", None).logprobs is None  # type: ignore[union-attr]  # not None


def test_a_call_ends_by_its_deadline_or_by_its_caller() -> None:
    call = call_of(deadline=20.0)
    assert call.ending(set(), 19.9) is None
    assert isinstance(call.ending(set(), 20.0), DeadlineExceeded)
    assert isinstance(call.ending({9}, 20.0), Cancelled)
    assert call.ending({8}, 1.0) is None
    assert call_of().ending(set(), 10**9) is None
    assert type(ending_error(True)) is not type(ending_error(False))


def test_only_what_is_pending_is_left_to_compute() -> None:
    answer = call_of(resume=Resume(generated=[[0, 1]], handed_out=[0], seed=3)).answers[0]
    answer.replay(PIECES)
    assert (answer.generated, answer.pending, answer.tokens) == (2, 5, [*PROMPT, 0, 1])
    answer.position = 4
    assert answer.pending == 1


def test_closing_frees_the_sampler_once() -> None:
    closed = []

    class Native:
        plain_greedy = True

        def close(self) -> None:
            closed.append(True)

    answer = call_of().answers[0]
    answer.sampler = Native()
    answer.close()
    answer.close()
    assert closed == [True]


def test_an_unfinished_answer_has_no_choice() -> None:
    with pytest.raises(AssertionError):
        call_of().answers[0].choice()
