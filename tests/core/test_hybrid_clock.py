"""Stamps that never go back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.hybrid_clock import MOST_AHEAD_MS, MOST_COUNTER, MOST_WALL_MS, HybridClock
from tars.core.mesh_messages import Stamp
from tars.core.types import NodeId

HERE, THERE = NodeId("here"), NodeId("there")
DAY = 86_400_000


def test_a_later_wall_clock_is_taken_over():
    clock = HybridClock(HERE)
    assert clock.tick(1_000) == Stamp(1_000, 0, HERE)
    assert clock.tick(1_001) == Stamp(1_001, 0, HERE)


def test_within_a_millisecond_and_after_the_clock_was_set_back_it_counts():
    clock = HybridClock(HERE)
    assert [clock.tick(at) for at in (5_000, 5_000, 1, -7)] == [Stamp(5_000, count, HERE) for count in range(4)]


def test_what_was_heard_is_earlier_than_what_is_said_next():
    clock = HybridClock(HERE)
    clock.tick(1_000)
    clock.observe(Stamp(9_000, 5, THERE))
    assert clock.tick(1_001) == Stamp(9_000, 6, HERE)
    clock.observe(Stamp(8_000, 77, THERE))
    assert clock.tick(1_002) == Stamp(9_000, 7, HERE)


def test_a_full_counter_takes_the_next_millisecond():
    clock = HybridClock(HERE, Stamp(1_000, MOST_COUNTER - 1, HERE))
    assert [clock.tick(0), clock.tick(0), clock.tick(0)] == [
        Stamp(1_000, MOST_COUNTER, HERE),
        Stamp(1_001, 0, HERE),
        Stamp(1_001, 1, HERE),
    ]


def test_it_goes_on_from_its_last_stamp_after_a_restart():
    clock = HybridClock(HERE)
    assert clock.last is None
    last = clock.tick(9_000)
    assert clock.last == last
    assert HybridClock(HERE, last).tick(4) > last


def test_a_wall_clock_beyond_48_bits_counts_as_the_last_moment():
    assert HybridClock(HERE).tick(2**60).wall_ms == MOST_WALL_MS


@given(
    st.lists(
        st.one_of(
            st.integers(-10, 2**48).map(lambda wall: ("tick", wall)),
            st.tuples(st.integers(0, 2**47), st.integers(0, MOST_COUNTER)).map(lambda seen: ("observe", seen)),
        ),
        max_size=50,
    )
)
def test_every_tick_is_later_than_all_before(events):
    clock = HybridClock(HERE)
    latest = (-1, -1)
    for what, value in events:
        if what == "observe":
            clock.observe(Stamp(*value, THERE))
            latest = max(latest, value)
        else:
            stamp = clock.tick(value)
            assert (stamp.wall_ms, stamp.counter) > latest
            assert 0 <= stamp.counter <= MOST_COUNTER
            latest = (stamp.wall_ms, stamp.counter)


def test_a_skewed_clock_is_believed_and_a_damaged_one_is_not():
    clock = HybridClock(HERE)
    now = 20_000 * DAY
    assert clock.why_damaged(Stamp(now + MOST_AHEAD_MS, 0, THERE), now) is None
    assert clock.why_damaged(Stamp(0, 0, THERE), now) is None
    said = clock.why_damaged(Stamp(now + MOST_AHEAD_MS + DAY, 0, THERE), now)
    assert said is not None
    assert "367 days ahead" in said
    assert "set the clocks" in said
    assert "there" in said


def test_a_pc_that_woke_up_in_1970_still_believes_its_peers():
    clock = HybridClock(HERE, Stamp(20_000 * DAY, 0, HERE))
    assert clock.why_damaged(Stamp(20_001 * DAY, 0, THERE), 5) is None
    assert HybridClock(HERE).why_damaged(Stamp(20_001 * DAY, 0, THERE), 5) is not None


@pytest.mark.parametrize(
    "stamp",
    [Stamp(-1, 0, THERE), Stamp(MOST_WALL_MS + 1, 0, THERE), Stamp(5, -1, THERE), Stamp(5, MOST_COUNTER + 1, THERE)],
)
def test_what_no_clock_gives_is_damaged(stamp):
    assert "outside what a clock gives" in (HybridClock(HERE).why_damaged(stamp, MOST_WALL_MS) or "")
