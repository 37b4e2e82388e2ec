"""What the caller has, what the next replica is told of it, and the answer that is made of several replicas' parts."""

from __future__ import annotations

import pytest
from hand_clock import Clock

from tars.messages.base import SavedState
from tars.messages.inference import Choice, CompleteParams, Delta, Generated, Timings, TokenLogprob, Usage
from tars.serving.continuation import SEEDS, StreamSoFar, seeded

SAVED = SavedState(node="node-1", id="one", bytes=10, sha256="0" * 64)


def work_of(**more: object) -> CompleteParams:
    return CompleteParams.model_validate({"prompt": "x", "seed": 7, **more})


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token=str(token), token_id=token, logprob=-0.5)


def generated(tokens: int, **more: object) -> Generated:
    usage = Usage(prompt_tokens=3, completion_tokens=tokens, total_tokens=3 + tokens)
    timings = Timings(queue_ms=5.0, first_token_ms=1.0, total_ms=2.0, tokens_per_second=9.0)
    return Generated.model_validate(
        {"text": "abc", "finish_reason": "stop", "usage": usage, "timings": timings, "seed": 7, **more}
    )


def test_a_seed_is_drawn_where_there_is_none_and_kept_where_there_is() -> None:
    assert seeded(work_of()).seed == 7
    drawn = seeded(CompleteParams(prompt="x"))
    assert drawn.seed is not None
    assert 0 <= drawn.seed < SEEDS
    assert (
        seeded(CompleteParams(prompt="x")).seed != drawn.seed or seeded(CompleteParams(prompt="x")).seed != drawn.seed
    )
    assert "seed" in drawn.model_dump(exclude_unset=True), "a peer must get it"
    with pytest.raises(ValueError, match="seed"):
        StreamSoFar(CompleteParams(prompt="x"))


def test_tokens_are_counted_by_answer_and_the_next_replica_is_told_all_of_them() -> None:
    stream = StreamSoFar(work_of(n=2))
    assert stream.resume() is None, "nothing was seen: it begins from the beginning"
    stream.take(Delta(text="a", token_ids=[1, 2]))
    stream.take(Delta(text="b", token_ids=[3], index=1))
    stream.take(Delta(text="", token_ids=[], index=1, ended=True))
    stream.take(Delta(text="c", token_ids=[4]))
    assert stream.tokens == ((1, 2, 4), (3,))
    told = stream.resume()
    assert told is not None
    assert (told.answers, told.handed_out, told.ended, told.seed, told.state) == ([[1, 2, 4], [3]], None, [1], 7, None)
    stream.take(Delta(text="d", token_ids=[5]))
    assert told.answers[0] == [1, 2, 4], "what was told does not grow with the stream"
    again = stream.resume()
    assert again is not None
    assert again.answers == [[1, 2, 4, 5], [3]], "the second break tells what both attempts gave"


def test_a_saved_state_brings_what_was_held_back_and_says_how_much_the_caller_has() -> None:
    stream = StreamSoFar(work_of())
    stream.take(Delta(text="a", token_ids=[1, 2]))
    told = stream.resume(SAVED, [[1, 2, 3]])
    assert told is not None
    assert (told.answers, told.handed_out, told.state) == ([[1, 2, 3]], [2], SAVED)
    unseen = StreamSoFar(work_of()).resume(SAVED, [[]])
    assert unseen is not None, "its prompt was computed, which is worth having"
    assert unseen.state == SAVED


@pytest.mark.parametrize("other", [[[1, 9, 3]], [[1]], [[1, 2], [3]], []])
def test_a_state_of_other_tokens_than_the_caller_has_is_left_out(other: list[list[int]]) -> None:
    stream = StreamSoFar(work_of())
    stream.take(Delta(text="a", token_ids=[1, 2]))
    told = stream.resume(SAVED, other)
    assert told is not None
    assert (told.answers, told.handed_out, told.state) == ([[1, 2]], None, None)


def test_tokens_held_back_are_computed_again_where_their_log_probabilities_are_asked_for() -> None:
    stream = StreamSoFar(work_of(logprobs=0))
    stream.take(Delta(text="a", token_ids=[1, 2], logprobs=[logprob(1), logprob(2)]))
    told = stream.resume(SAVED, [[1, 2, 3]])
    assert told is not None
    assert (told.answers, told.state) == ([[1, 2]], None)
    same = stream.resume(SAVED, [[1, 2]])
    assert same is not None
    assert same.state == SAVED


def test_the_answer_has_the_log_probabilities_of_every_part_and_the_whole_calls_times() -> None:
    clock = Clock(100.0)
    stream = StreamSoFar(work_of(n=2, logprobs=0), clock)
    clock.now += 0.25
    stream.take(Delta(text="a", token_ids=[1], logprobs=[logprob(1)]))
    stream.take(Delta(text="b", token_ids=[2], logprobs=[logprob(2)], index=1))
    clock.now += 1.0
    assert stream.resume() is not None
    stream.take(Delta(text="c", token_ids=[3, 4], logprobs=[logprob(3), logprob(4)]))
    clock.now += 1.0
    last = generated(
        4,
        logprobs=[logprob(3), logprob(4)],
        further=[Choice(index=1, text="b", finish_reason="length", logprobs=[])],
    )
    whole = stream.merged(last)
    assert whole.logprobs == [logprob(1), logprob(3), logprob(4)]
    assert whole.further[0].logprobs == [logprob(2)]
    assert whole.timings == Timings(queue_ms=5.0, first_token_ms=250.0, total_ms=2250.0, tokens_per_second=1.5)
    assert (whole.text, whole.usage, whole.finish_reason, whole.seed) == ("abc", last.usage, "stop", 7)


def test_without_log_probabilities_none_are_made_up() -> None:
    clock = Clock(100.0)
    stream = StreamSoFar(work_of(), clock)
    whole = stream.merged(generated(0))
    assert whole.logprobs is None
    assert whole.timings.first_token_ms is None
    assert whole.timings.tokens_per_second is None
