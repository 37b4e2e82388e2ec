"""Counting the calls of one worker: who finds a slot, who waits, who is refused."""

from __future__ import annotations

import asyncio

import pytest

from tars.errors import Overloaded
from tars.messages.inference import CompleteParams
from tars.workers.calls_in_flight import CallsInFlight

WORK = CompleteParams(prompt="x")


def calls_of(*widths: int) -> CallsInFlight:
    calls = CallsInFlight(2)
    for width in widths:
        calls.add(WORK, 60, width, None)
    return calls


async def test_numbers_count_on_and_are_never_used_again() -> None:
    calls = calls_of(1, 1)
    assert calls.next_number == 4
    first, second = calls.get(2), calls.get(3)
    assert first is not None
    assert second is not None
    assert first is not second
    assert calls.remove(3) is second
    assert (calls.get(3), calls.remove(3), calls.get(None)) == (None, None, None)
    assert calls.add(WORK, 60, 1, None)[0] == 4
    assert (len(calls), calls.total) == (2, 3)


@pytest.mark.parametrize(
    ("widths", "slots", "served"),
    [
        ((), 2, 0),
        ((1, 1, 1), 2, 2),
        ((2, 2, 2), 4, 2),
        # One that needs several begins with what is free.
        ((1, 4, 1), 2, 2),
        # What needs none is served beside the others.
        ((1, 1, 0), 1, 2),
    ],
)
async def test_calls_find_slots_in_their_order(widths: tuple[int, ...], slots: int, served: int) -> None:
    assert calls_of(*widths).served(slots) == served


@pytest.mark.parametrize(
    ("widths", "limit", "refused"),
    [
        ((), 0, False),
        ((1,), 0, False),
        ((1, 1), 0, True),
        ((2,), 0, True),
        ((1, 1), 1, False),
        ((1, 1, 1), 1, True),
        ((1, 1, 1), 2, False),
    ],
)
async def test_a_call_is_refused_only_where_it_would_wait_beyond_the_bound(
    widths: tuple[int, ...], limit: int, refused: bool
) -> None:
    calls = calls_of(*widths)
    if not refused:
        calls.refuse_beyond(limit, slots=2)
        return
    with pytest.raises(Overloaded) as caught:
        calls.refuse_beyond(limit, slots=2)
    assert caught.value.details == {"limit": limit, "queued": max(0, len(widths) - 2)}


async def test_who_is_refused_hears_how_long_half_of_the_queue_takes() -> None:
    calls = calls_of(*[1] * 12)

    def told() -> int:
        with pytest.raises(Overloaded) as caught:
            calls.refuse_beyond(10, slots=2)
        assert caught.value.retry_after_ms is not None
        return caught.value.retry_after_ms

    assert told() == 2500
    for _ in range(200):
        calls.lasted(4.0)
    assert told() == pytest.approx(10_000, rel=0.01)
    for _ in range(200):
        calls.lasted(1000.0)
    assert told() == 60_000
    for _ in range(200):
        calls.lasted(0.0)
    assert told() == 200


@pytest.mark.parametrize("at_once", [False, True])
async def test_whoever_waits_for_the_end_of_all_hears_of_it(at_once: bool) -> None:
    calls = CallsInFlight(2)
    await asyncio.wait_for(calls.wait_until_idle(), 5)
    numbers = [calls.add(WORK, 60, 1, None)[0] for _ in range(2)]
    waiting = asyncio.create_task(calls.wait_until_idle())
    if at_once:
        assert list(calls.remove_all()) == numbers
    else:
        calls.remove(numbers[0])
        await asyncio.sleep(0)
        assert not waiting.done()
        calls.remove(numbers[1])
    await asyncio.wait_for(waiting, 5)
    assert len(calls) == 0
