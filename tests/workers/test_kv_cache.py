"""Bookkeeping of the KV cache; a model of llama.cpp's memory performs the actions and has to agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.workers.kv_cache import LEFT, WORTH_COPYING, Action, Copy, KvCache, Place, Trim, common_beginning

SYSTEM = list(range(1000, 1100))


class Memory:
    """What llama.cpp would hold: tokens of each stream."""

    def __init__(self, streams: int) -> None:
        self.streams: list[list[int]] = [[] for _ in range(streams)]

    def perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Copy):
                assert not self.streams[action.target], "llama.cpp copies into empty streams"
                assert len(self.streams[action.source]) >= action.length
                self.streams[action.target] = self.streams[action.source][: action.length]
            else:
                del self.streams[action.stream][action.length :]


def begin(cache: KvCache, memory: Memory, prompt: list[int], adapter: str = "") -> Place:
    place = cache.take(prompt, adapter)
    assert place is not None
    memory.perform(place.actions)
    assert memory.streams[place.stream] == prompt[: place.kept]
    rest = prompt[place.kept :]
    cache.append(place.stream, rest)
    memory.streams[place.stream] += rest
    return place


def split(streams: int = 4, **options: int) -> tuple[KvCache, Memory]:
    return KvCache(streams, streams * 1024, shared=False, **options), Memory(streams)


def test_a_second_turn_goes_on_in_place_and_computes_only_what_is_new() -> None:
    cache, memory = split()
    first = [*SYSTEM, 1, 2, 3]
    place = begin(cache, memory, first)
    cache.append(place.stream, [7, 8, 9])
    memory.streams[place.stream] += [7, 8, 9]
    cache.release(place.stream)
    again = begin(cache, memory, [*first, 7, 8, 9, 20, 21, 22])
    assert (again.stream, again.kept, again.actions) == (place.stream, len(first) + 3, ())


def test_the_last_tokens_of_a_prompt_are_always_computed() -> None:
    cache, memory = split()
    place = begin(cache, memory, SYSTEM)
    cache.release(place.stream)
    assert begin(cache, memory, SYSTEM).kept == len(SYSTEM) - LEFT


def test_a_beginning_is_copied_from_a_running_sequence_which_keeps_its_own() -> None:
    cache, memory = split()
    one = begin(cache, memory, [*SYSTEM, 1, 2, 3])
    two = begin(cache, memory, [*SYSTEM, 4, 5, 6])
    assert two.kept == len(SYSTEM)
    assert two.actions == (Copy(one.stream, two.stream, len(SYSTEM)),)
    assert memory.streams[one.stream] == [*SYSTEM, 1, 2, 3]


def test_an_empty_stream_is_preferred_to_one_that_remembers_something_else() -> None:
    cache, memory = split()
    one = begin(cache, memory, [*SYSTEM, 1, 2])
    cache.release(one.stream)
    other = begin(cache, memory, list(range(50)))
    assert other.stream != one.stream
    assert cache.beginning([*SYSTEM, 1, 2, 3, 4]) == len(SYSTEM) + 2


def test_a_few_common_tokens_cost_nobody_his_place() -> None:
    cache, memory = split()
    common = SYSTEM[: WORTH_COPYING - 1]
    one = begin(cache, memory, [*common, *range(200)])
    cache.release(one.stream)
    two = begin(cache, memory, [*common, *range(500, 700)])
    assert (two.stream != one.stream, two.kept) == (True, 0)


def test_the_least_recently_used_stream_gives_way_when_all_remember_something() -> None:
    cache, memory = split(2)
    for start in (0, 1000):
        cache.release(begin(cache, memory, list(range(start, start + 40))).stream)
    begin(cache, memory, list(range(5000, 5040)))
    assert cache.beginning(list(range(1000, 1040))) == 40 - LEFT
    assert cache.beginning(list(range(40))) == 0


def test_no_stream_is_given_twice() -> None:
    cache, memory = split(2)
    begin(cache, memory, SYSTEM)
    begin(cache, memory, SYSTEM)
    assert cache.take(SYSTEM) is None
    assert cache.streams_free() == 0


def test_another_adapters_cells_are_worth_nothing() -> None:
    cache, memory = split()
    cache.release(begin(cache, memory, SYSTEM, "pirate").stream)
    assert begin(cache, memory, SYSTEM).kept == 0
    assert begin(cache, memory, SYSTEM, "pirate").kept == len(SYSTEM) - LEFT


def test_an_exact_cache_reuses_whole_chunks_of_prompts_only() -> None:
    cache, memory = split(chunk=32)
    place = cache.take(SYSTEM)
    assert place is not None
    for start in range(0, len(SYSTEM), 32):
        part = SYSTEM[start : start + 32]
        cache.append(place.stream, part, chunked=len(part) == 32)
    cache.append(place.stream, [1, 2, 3] * 20)
    cache.release(place.stream)
    memory.streams[place.stream] = [*SYSTEM, *[1, 2, 3] * 20]
    assert begin(cache, memory, [*SYSTEM, *[1, 2, 3] * 20, 5, 6]).kept == 96


def test_a_model_that_forgets_only_whole_sequences_reuses_only_whole_ones() -> None:
    cache = KvCache(2, 2048, shared=False, partial=False)
    memory = Memory(2)
    place = begin(cache, memory, [*SYSTEM, 1, 2])
    cache.release(place.stream)
    assert cache.beginning([*SYSTEM, 9, 9, 9]) == 0
    assert cache.beginning([*SYSTEM, 1, 2, 3, 4]) == len(SYSTEM) + 2


def test_shared_cells_are_counted_once_however_many_have_them() -> None:
    cache, memory = KvCache(4, 400, shared=True), Memory(4)
    for last in range(4):
        begin(cache, memory, [*SYSTEM, last, last, last])
    assert cache.used == len(SYSTEM) + 4 * 3
    assert cache.free == 400 - cache.used


def test_room_is_made_from_ended_sequences_oldest_first_and_never_from_running_ones() -> None:
    cache, memory = KvCache(4, 100, shared=True), Memory(4)
    old = begin(cache, memory, list(range(30)))
    newer = begin(cache, memory, list(range(100, 130)))
    running = begin(cache, memory, list(range(200, 230)))
    cache.release(old.stream)
    cache.release(newer.stream)
    assert cache.room_for(10) == ()
    assert cache.room_for(40) == (Trim(old.stream, 0),)
    assert cache.room_for(71) is None
    assert cache.room_for(70) == (Trim(newer.stream, 0),)
    assert cache.length(running.stream) == 30


def test_split_streams_always_have_room() -> None:
    cache, memory = split(2)
    begin(cache, memory, SYSTEM)
    assert cache.room_for(10_000) == ()


def test_a_cache_without_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a stream"):
        KvCache(0, 100, shared=True)


def test_common_beginnings() -> None:
    assert common_beginning([1, 2, 3], [1, 2, 3], 2) == 2
    assert common_beginning([1, 2, 3], [1, 9, 3], 5) == 1
    assert common_beginning([], [1], 1) == 0
    assert common_beginning([1], [1], -1) == 0


def test_a_new_sequence_goes_beside_the_running_ones_and_what_lay_there_is_kept() -> None:
    cache, memory = split(streams=4)
    prompts = [[100 * number + index for index in range(50)] for number in range(3)]
    places = [begin(cache, memory, prompt) for prompt in prompts]
    assert [place.stream for place in places] == [0, 1, 2]
    cache.release(1)
    cache.release(2)
    new = begin(cache, memory, [7] * 40)
    assert new.stream == 1, "stream 3 is empty, but a gap would cost every step a pass over the weights"
    assert cache.beginning([*prompts[1], 1, 2]) == 50
    assert memory.streams[3] == prompts[1]


def test_where_saved_cells_come_at_once_nothing_is_copied_out_of_their_way() -> None:
    cache, memory = split(streams=4)
    for number in range(3):
        begin(cache, memory, [100 * number + index for index in range(50)])
    cache.release(1)
    place = cache.take((), aside=False)
    assert place is not None
    assert (place.stream, place.actions) == (1, (Trim(1, 0),))


def test_what_nothing_older_gives_way_to_is_lost() -> None:
    cache, memory = split(streams=3)
    prompts = [[100 * number + index for index in range(50)] for number in range(3)]
    for prompt in prompts:
        begin(cache, memory, prompt)
    cache.release(1)
    cache.release(2)
    assert begin(cache, memory, [7] * 40).stream == 1
    assert cache.beginning([*prompts[1], 1, 2]) == 0, "it was the one used least recently"
    assert cache.beginning([*prompts[2], 1, 2]) == 50


def test_one_caller_goes_on_where_his_chat_lies_wherever_that_is() -> None:
    cache, memory = split(streams=4)
    for number in range(3):
        begin(cache, memory, [100 * number + index for index in range(50)])
    for number in range(3):
        cache.release(number)
    again = begin(cache, memory, [*range(200, 250), 1, 2, 3])
    assert (again.stream, again.kept, again.actions) == (2, 50, ())


def test_a_running_sequence_moves_into_the_gap_that_another_left() -> None:
    cache, memory = split(streams=4)
    prompts = [[100 * number + index for index in range(50)] for number in range(4)]
    for prompt in prompts:
        begin(cache, memory, prompt)
    cache.release(1)
    cache.release(2)
    first = cache.close_up()
    assert first is not None
    source, target, actions = first
    assert (source, target) == (3, 1)
    memory.perform(actions)
    assert memory.streams[1] == prompts[3]
    assert memory.streams[3] == []
    assert cache.close_up() is None
    assert cache.beginning([*prompts[2], 1, 2]) == 50


def test_where_sequences_share_cells_or_cannot_be_moved_nothing_is() -> None:
    for cache in (KvCache(4, 400, shared=True), KvCache(4, 400, shared=False, partial=False)):
        memory = Memory(4)
        for number in range(3):
            begin(cache, memory, [number] * 30)
        cache.release(1)
        assert cache.close_up() is None


@settings(max_examples=3 * settings().max_examples // 2)
@given(
    shared=st.booleans(),
    chunk=st.sampled_from([0, 4]),
    steps=st.lists(
        st.tuples(st.sampled_from(["begin", "end", "drop", "grow", "close up"]), st.integers(0, 5), st.integers(0, 7)),
        max_size=60,
    ),
)
def test_whatever_happens_the_bookkeeping_agrees_with_the_memory(
    shared: bool, chunk: int, steps: list[tuple[str, int, int]]
) -> None:
    cache, memory = KvCache(5, 500, shared=shared, chunk=chunk), Memory(5)
    running: list[int] = []
    for kind, choice, last in steps:
        if kind == "begin":
            prompt = [*SYSTEM[: 10 * choice], *[last] * 5]
            if cache.streams_free() and cache.free + cache.cached >= len(prompt):
                place = cache.take(prompt)
                assert place is not None
                memory.perform(place.actions)
                assert memory.streams[place.stream] == prompt[: place.kept]
                assert place.kept <= len(prompt) - LEFT
                rest = prompt[place.kept :]
                room = cache.room_for(len(rest))
                assert room is not None
                memory.perform(room)
                assert memory.streams[place.stream] == prompt[: place.kept], "room was made of a running sequence"
                cache.append(place.stream, rest)
                memory.streams[place.stream] += rest
                running.append(place.stream)
        elif kind == "grow" and running:
            stream = running[choice % len(running)]
            if (room := cache.room_for(1)) is not None and cache.length(stream) < 100:
                memory.perform(room)
                cache.append(stream, [last])
                memory.streams[stream].append(last)
        elif kind == "close up":
            while (moved := cache.close_up()) is not None:
                source, target, actions = moved
                assert source in running
                assert target not in running
                tokens, span = list(memory.streams[source]), max(running) - min(running)
                memory.perform(actions)
                assert (memory.streams[target], memory.streams[source]) == (tokens, [])
                running[running.index(source)] = target
                assert max(running) - min(running) < span
            assert shared or not running or max(running) - min(running) + 1 == len(running)
        elif running:
            stream = running.pop(choice % len(running))
            memory.perform(cache.release(stream, keep=kind == "end"))
        assert [cache.length(number) for number in range(5)] == [len(tokens) for tokens in memory.streams]
        if not chunk and not any(cache.length(number) == 0 for number in range(5)):
            for number in set(range(5)) - set(running):
                assert cache.beginning([*memory.streams[number], -1, -2]) >= cache.length(number)
        assert cache.free >= 0
        assert cache.used + cache.cached + cache.free == 500
