"""How one decode is made of what is due, and that one which came to nothing leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tars.messages.inference import CompleteParams
from tars.workers.answer_format import AnswerFormat
from tars.workers.engine import Submission
from tars.workers.generation import Answer, Call
from tars.workers.kv_cache import KvCache

if TYPE_CHECKING:
    from tars.workers.decoding import Decoding

pytestmark = pytest.mark.model  # importing the module loads llama.cpp

ROOM = 20


class Recorded:
    """A context that computes nothing and notes what it is asked for; the logits of a batch's entry are its index."""

    def __init__(self, streams: int, shared: bool) -> None:
        self.streams, self.shared = streams, shared
        self.batches: list[tuple[list[int], list[int], list[int], list[int]]] = []
        self.forgotten: list[tuple[int, int]] = []
        self.partly = True
        self.fails: Callable[[], None] = lambda: None

    def decode(self, tokens: list[int], positions: list[int], streams: list[int], wanted: list[int]) -> Any:
        self.batches.append((list(tokens), list(positions), list(streams), list(wanted)))
        self.fails()
        return np.array(wanted, dtype=np.float32).reshape(-1, 1)

    def forget(self, stream: int, position: int) -> bool:
        self.forgotten.append((stream, position))
        return self.partly

    def perform(self, actions: Sequence[object]) -> bool:
        return True


class Bench:
    """A `Decoding`, and what it tells; the chosen tokens are those of `next_tokens`, else 9."""

    def __init__(self, streams: int = 6, *, shared: bool = False, cells: int | None = None, **changes: Any) -> None:
        from tars.workers.decoding import Decoding

        self.context: Any = Recorded(streams, shared)
        self.cache = KvCache(streams, cells or streams * ROOM, shared=shared)
        self.chosen: list[tuple[int, float]] = []
        self.next_tokens: list[int] = []
        self.adapted: list[str] = []
        self.without_room: list[int] = []
        self.still: list[tuple[int, int]] = []
        self.decoding: Decoding = Decoding(
            self.context,
            self.cache,
            **{"room": ROOM, "gap": 0, "least_rows": 1, "chunk": 0, **changes},
            choose=self._choose,
            adapt=self.adapted.append,
            no_room=lambda answers: self.without_room.extend(answer.call.number for answer in answers),
            stood_still=lambda answers, tokens: self.still.extend((answer.call.number, tokens) for answer in answers),
        )

    def _choose(self, answers: list[Answer], rows: Any) -> None:
        assert self.decoding.computing == frozenset(), "nothing is left that could be stopped"
        for answer, row in zip(answers, rows, strict=True):
            self.chosen.append((answer.call.number, float(row[0])))
            answer.tokens.append(self.next_tokens.pop(0) if self.next_tokens else 9)

    def answer(self, stream: int, prompt: Sequence[int] = (1, 2, 3), *, computed: int = 0, adapter: str = "") -> Answer:
        """An answer in that stream, whose call has that number too; of its prompt so much is in the cache."""
        submission = Submission(stream, CompleteParams(prompt="x"), None)
        call = Call(submission, prompt, seed=1, context=ROOM, answers=AnswerFormat.of(None), adapter=adapter)
        answer = call.answers[0]
        self.cache._streams[stream].taken = True
        self.cache.append(stream, prompt[:computed])
        answer.stream, answer.position = stream, computed
        return answer


def stop(bench: Bench) -> None:
    from tars.workers.llama_context import Aborted

    def fails() -> None:
        raise Aborted

    bench.context.fails = fails


def test_each_answers_part_stands_at_its_place_and_only_ends_are_chosen_for() -> None:
    bench = Bench()
    whole, part = bench.answer(1, (1, 2, 3), computed=1), bench.answer(2, (4, 5, 6))
    assert bench.decoding.compute([(whole, 2), (part, 2)], fill=False)
    assert bench.context.batches == [([2, 3, 4, 5], [1, 2, 0, 1], [1, 1, 2, 2], [1])]
    assert bench.chosen == [(1, 1.0)]
    assert (whole.tokens, whole.position, part.position) == ([1, 2, 3, 9], 3, 2)
    assert [bench.cache.length(stream) for stream in range(4)] == [0, 3, 2, 0]
    assert bench.decoding.steps == 1


@pytest.mark.parametrize(
    ("running", "changes", "along"),
    [
        ([1, 3], {"gap": 0}, []),
        ([1, 3], {"gap": 1}, [2]),
        ([0, 3, 5], {"gap": 1}, [4]),
        ([0, 3, 5], {"gap": 2}, [1, 2, 4]),
        ([3], {"least_rows": 2}, [2]),
        ([0], {"least_rows": 2}, [1]),
        ([2, 3], {"least_rows": 2}, []),
        ([1, 3], {"gap": 5, "shared": True}, []),
    ],
)
def test_idle_streams_that_are_computed_along_keep_what_they_have(
    running: list[int], changes: dict[str, Any], along: list[int]
) -> None:
    bench = Bench(**changes)
    answers = [bench.answer(stream, computed=2) for stream in running]
    if 2 not in running:
        bench.cache.append(2, [7, 7, 7])
    lengths = [bench.cache.length(stream) for stream in range(6)]
    assert bench.decoding.compute([(answer, 1) for answer in answers], fill=True)
    ((tokens, positions, streams, wanted),) = bench.context.batches
    assert streams == sorted([*running, *along])
    assert [streams[index] for index in wanted] == running
    assert bench.context.forgotten == [(stream, lengths[stream]) for stream in along], "their extra token goes again"
    assert [positions[streams.index(stream)] for stream in along] == [lengths[stream] for stream in along]
    assert [bench.cache.length(stream) for stream in range(6)] == [
        length + (stream in running) for stream, length in enumerate(lengths)
    ]
    assert len(tokens) == len(streams)


def test_an_idle_stream_that_is_full_is_not_computed_along() -> None:
    bench = Bench(gap=2)
    answers = [bench.answer(stream, computed=2) for stream in (0, 2)]
    bench.cache.append(1, [7] * ROOM)
    bench.decoding.compute([(answer, 1) for answer in answers], fill=True)
    assert bench.context.batches[0][2] == [0, 2]


def test_a_part_of_a_prompt_takes_no_idle_stream_along() -> None:
    bench = Bench(gap=5, least_rows=2)
    bench.decoding.compute([(bench.answer(0), 2), (bench.answer(3), 3)], fill=False)
    assert bench.context.batches[0][2] == [0, 0, 3, 3, 3]


@pytest.mark.parametrize(("computed", "count", "borders"), [(0, 2, 2), (2, 2, 4), (2, 1, 0), (4, 1, 0)])
def test_in_exact_mode_only_whole_chunks_of_a_prompt_may_be_taken_over(computed: int, count: int, borders: int) -> None:
    bench = Bench(chunk=2)
    answer = bench.answer(0, (1, 2, 3, 4, 5), computed=computed)
    bench.decoding.compute([(answer, count)], fill=False)
    assert bench.cache._streams[0].whole_chunks == borders
    # What it generates is no chunk of its prompt, where it ends one.
    answer.tokens += [9] * (6 - len(answer.tokens))
    answer.position = 5
    before = bench.cache._streams[0].whole_chunks
    bench.decoding.compute([(answer, 1)], fill=True)
    assert bench.cache._streams[0].whole_chunks == before


@pytest.mark.parametrize("by_watchdog", [False, True])
def test_a_stopped_decode_leaves_the_answers_where_they_were(by_watchdog: bool) -> None:
    bench = Bench(gap=1)
    answers = [bench.answer(stream, computed=2) for stream in (0, 2)]
    stop(bench)
    bench.decoding.stopped_by_watchdog = by_watchdog
    assert not bench.decoding.compute([(answer, 1) for answer in answers], fill=True)
    assert sorted(bench.context.forgotten) == [(0, 2), (1, 0), (2, 2)]
    assert [answer.position for answer in answers] == [2, 2]
    assert bench.chosen == []
    # A cancelled call's error comes from its inbox; the watchdog's from the batcher, with how much there was to compute.
    assert bench.still == ([(0, 3), (2, 3)] if by_watchdog else [])
    assert not bench.decoding.stopped_by_watchdog
    assert (bench.decoding.computing, bench.decoding.steps) == (frozenset(), 1)


def test_a_model_that_forgets_only_whole_sequences_begins_a_stopped_one_anew() -> None:
    bench = Bench()
    answer = bench.answer(0, computed=2)
    bench.context.partly = False
    stop(bench)
    bench.decoding.compute([(answer, 1)], fill=True)
    assert (answer.position, bench.cache.length(0)) == (0, 0)


def test_a_decode_without_room_changes_nothing_and_is_told() -> None:
    from tars.workers.llama_context import NoRoom

    bench = Bench()
    answer = bench.answer(4, computed=2)

    def fails() -> None:
        assert bench.decoding.computing == {4}
        raise NoRoom

    bench.context.fails = fails
    assert not bench.decoding.compute([(answer, 1)], fill=True)
    assert (bench.without_room, answer.position, bench.context.forgotten) == ([4], 2, [])
    assert bench.decoding.computing == frozenset()


def test_a_decode_computes_with_the_adapter_of_its_answers() -> None:
    bench = Bench()
    bench.decoding.compute([(bench.answer(0, adapter="blue"), 3)], fill=False)
    assert bench.adapted == ["blue"]
    assert bench.decoding.adapter == "blue"


class Proposed:
    """A draft model that proposes what it was told to."""

    def __init__(self, *proposals: list[int]) -> None:
        self.proposals = list(proposals)
        self.results: list[tuple[int, int, bool]] = []
        self.given_up = False

    def propose(self, answers: Sequence[Answer], room: int) -> list[list[int]]:
        assert room == ROOM
        return self.proposals

    def took(self, proposed: int, accepted: int, *, ended: bool) -> None:
        self.results.append((proposed, accepted, ended))

    def give_up(self) -> None:
        self.given_up = True


def test_of_proposals_as_many_are_taken_as_the_sampler_chooses_too_and_the_one_after_them() -> None:
    bench = Bench()
    drafting: Any = Proposed([5, 6], [5, 6])
    answers = [bench.answer(0, computed=2), bench.answer(1, computed=2)]
    bench.next_tokens = [5, 8, 6, 7]  # both first, then the one that goes on
    assert bench.decoding.compute_drafted(drafting, answers)
    ((tokens, positions, streams, wanted),) = bench.context.batches
    assert (tokens, positions, streams) == ([3, 5, 6] * 2, [2, 3, 4] * 2, [0, 0, 0, 1, 1, 1])
    assert wanted == list(range(6))
    assert bench.chosen == [(0, 0.0), (1, 3.0), (0, 1.0), (0, 2.0)]
    assert [answer.tokens for answer in answers] == [[1, 2, 3, 5, 6, 7], [1, 2, 3, 8]]
    assert [answer.position for answer in answers] == [5, 3]
    assert [bench.cache.length(stream) for stream in (0, 1)] == [5, 3]
    assert bench.context.forgotten == [(0, 5), (1, 3)], "what was wrong goes again"
    assert drafting.results == [(2, 2, False), (2, 0, False)]


def test_nothing_is_drafted_where_there_are_no_proposals_or_no_cells_for_them() -> None:
    bench = Bench(2, shared=True, cells=4)
    answer = bench.answer(0, computed=2)
    nothing: Any = Proposed()
    assert not bench.decoding.compute_drafted(nothing, [answer])
    assert not nothing.given_up
    too_much: Any = Proposed([5, 6])
    assert not bench.decoding.compute_drafted(too_much, [answer])
    bench.decoding.stopped_by_watchdog = True
    assert not bench.decoding.compute_drafted(nothing, [answer])
    assert nothing.given_up, "a draft that did not end is not asked again"
    assert bench.context.batches == []
