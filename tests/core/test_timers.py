"""Timers fire in order, may be moved away or cancelled, and may set others."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.timers import NEVER, Timers


def test_they_fire_in_order_and_equal_ones_as_they_were_set():
    timers, fired = Timers(), []
    for due, name in [(3, "c"), (1, "a"), (2, "b"), (1, "a2")]:
        timers.at(due, lambda now, name=name: fired.append((name, now)))
    assert timers.next_due() == 1
    timers.run(2.5)
    assert fired == [("a", 2.5), ("a2", 2.5), ("b", 2.5)]
    assert timers.next_due() == 3


def test_cancelled_and_moved_ones():
    timers, fired = Timers(), []
    cancelled = timers.at(1, fired.append)
    moved = timers.at(1, fired.append)
    cancelled.cancelled = True
    moved.due = 5
    assert timers.next_due() == 5
    timers.run(4)
    assert fired == []
    timers.run(5)
    assert fired == [5]
    assert timers.next_due() == NEVER


def test_what_a_timer_sets_for_now_fires_too():
    timers, fired = Timers(), []
    timers.at(1, lambda now: timers.at(now, fired.append))
    timers.run(1)
    assert fired == [1]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10), st.booleans())))
def test_each_fires_once_at_the_first_run_after_it_is_due(plan):
    timers, fired, expected = Timers(), [], {}
    for index, (due, later, cancelled) in enumerate(plan):
        timer = timers.at(due, lambda now, index=index: fired.append((index, now)))
        timer.due += later
        timer.cancelled = cancelled
        if not cancelled:
            expected[index] = due + later
    for now in range(31):
        assert timers.next_due() >= now
        timers.run(now)
    assert dict(fired) == expected
    assert len(fired) == len(expected)
