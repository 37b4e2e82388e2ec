"""When a replica counts as late."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.learned_deadlines import (
    FIRST_LEAST_SECONDS,
    FIRST_MOST_SECONDS,
    FIRST_UNKNOWN_SECONDS,
    GAP_LEAST_SECONDS,
    GAP_MOST_SECONDS,
    GAP_UNKNOWN_SECONDS,
    HEDGE_SAMPLES,
    MEASURED_SECONDS,
    MOST_KEPT,
    MOST_SIZES,
    WINDOW,
    LearnedDeadlines,
)
from tars.core.types import ReplicaId

R = ReplicaId("r")


def test_of_whom_nothing_is_known_the_bounds_are_generous():
    deadlines = LearnedDeadlines()
    assert deadlines.first_token(R, 0.0, 0.0) == FIRST_UNKNOWN_SECONDS
    assert deadlines.gap(R, 0.0) == GAP_UNKNOWN_SECONDS
    assert deadlines.answer_p95("m", 1.0, 0.0) is None


def test_a_quick_replica_is_late_soon_and_a_slow_one_later():
    deadlines, slow = LearnedDeadlines(), ReplicaId("slow")
    for step in range(50):
        deadlines.saw_gap(R, 0.01, step)
        deadlines.saw_gap(slow, 1.5 + 0.5 * (step % 2), step)
        deadlines.saw_first_token(R, 0.2, 0.15, step)
        deadlines.saw_first_token(slow, 9.0, 2.0, step)
    assert deadlines.gap(R, 50.0) == GAP_LEAST_SECONDS
    assert 2.0 < deadlines.gap(slow, 50.0) < 4.0, "a step of 2 s is nothing new there"
    assert deadlines.first_token(R, 0.15, 50.0) == pytest.approx(2 * 0.15 + FIRST_LEAST_SECONDS)
    assert 2 * 2.0 + 7.0 < deadlines.first_token(slow, 2.0, 50.0) < 2 * 2.0 + 1.5 * 7.0


def test_a_long_queue_is_no_lateness():
    deadlines = LearnedDeadlines()
    for step in range(20):
        deadlines.saw_first_token(R, 0.1, 0.1, step)
    assert deadlines.first_token(R, 12.0, 20.0) == pytest.approx(24.0 + FIRST_LEAST_SECONDS)


def test_what_was_given_up_gets_twice_the_time_until_it_is_measured_again():
    deadlines = LearnedDeadlines()
    for step in range(20):
        deadlines.saw_gap(R, 0.01, step)
        deadlines.saw_first_token(R, 0.1, 0.1, step)
    bounds = []
    for _ in range(6):
        deadlines.gave_up_gap(R)
        bounds.append(deadlines.gap(R, 20.0))
    assert bounds == [2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    deadlines.gave_up_first(R)
    assert deadlines.first_token(R, 0.0, 20.0) == pytest.approx(2 * FIRST_LEAST_SECONDS)
    deadlines.saw_gap(R, 3.0, 21.0)
    assert deadlines.gap(R, 21.0) == pytest.approx(0.01 + 2.99 / 8 + 4 * 2.99 / 4, abs=0.02), (
        "slower now, and known to be"
    )


def test_a_stall_is_remembered_for_a_while_although_tokens_come_quickly_again_and_a_stop_is_not():
    deadlines = LearnedDeadlines()
    for step in range(100):
        deadlines.saw_gap(R, 1.6 if step == 50 else 0.01, step * 0.01)
    assert 2.0 < deadlines.gap(R, 1.0) < 2.4
    assert deadlines.gap(R, 60.0) == GAP_LEAST_SECONDS
    for step in range(100):
        deadlines.saw_gap(R, 6.0 if step == 50 else 0.01, 100 + step * 0.01)
    assert deadlines.gap(R, 101.0) < 1.2


def test_one_that_was_given_up_and_goes_on_for_others_was_only_slow():
    deadlines = LearnedDeadlines()
    deadlines.saw_gap(R, 0.01, 0.0)
    assert deadlines.gap(R, 0.0) == GAP_LEAST_SECONDS
    deadlines.gave_up_gap(R)
    for step in range(100):
        deadlines.saw_gap(R, 0.01, 0.1 + step * 0.01)
    assert 1.4 < deadlines.gap(R, 1.1) <= 1.5


def test_old_measurements_and_those_of_another_worker_are_forgotten():
    deadlines = LearnedDeadlines()
    deadlines.saw_gap(R, 0.01, 0.0)
    assert deadlines.gap(R, MEASURED_SECONDS) == GAP_LEAST_SECONDS
    assert deadlines.gap(R, MEASURED_SECONDS + 1) == GAP_UNKNOWN_SECONDS
    deadlines.saw_gap(R, 0.02, 2000.0)
    assert deadlines.gap(R, 2000.0) == GAP_LEAST_SECONDS
    deadlines.forget(R)
    assert deadlines.gap(R, 2000.0) == GAP_UNKNOWN_SECONDS
    deadlines.gave_up_gap(R)
    assert deadlines.gap(R, 2000.0) == GAP_MOST_SECONDS


def test_the_95th_percentile_is_of_answers_of_that_size():
    deadlines = LearnedDeadlines()
    times = [number / 100 for number in range(1, 101)]
    random.Random(3).shuffle(times)
    for number, seconds in enumerate(times):
        known = deadlines.answer_p95("m", 32.0, float(number))
        assert (known is None) == (number < HEDGE_SAMPLES)
        deadlines.saw_answer("m", 32.0, seconds, float(number))
    assert deadlines.answer_p95("m", 63.0, 100.0) == 0.95
    assert deadlines.answer_p95("m", 64.0, 100.0) is None
    assert deadlines.answer_p95("other", 32.0, 100.0) is None


def test_only_the_last_answers_count():
    deadlines = LearnedDeadlines()
    for number in range(WINDOW):
        deadlines.saw_answer("m", 1.0, 5.0, 0.01 * number)
    for number in range(WINDOW):
        deadlines.saw_answer("m", 1.0, 0.1, 10 + 0.01 * number)
    assert deadlines.answer_p95("m", 1.0, 20.0) == 0.1
    assert deadlines.answer_p95("m", 1.0, 10 + 2 + MEASURED_SECONDS) is None


def test_what_is_kept_is_bounded():
    deadlines = LearnedDeadlines()
    for number in range(MOST_KEPT + 10):
        deadlines.saw_gap(ReplicaId(str(number)), 0.1, 0.0)
    for number in range(MOST_SIZES + 10):
        deadlines.saw_answer(f"m{number}", 1.0, 0.1, 0.0)
    assert len(deadlines._books) == MOST_KEPT
    assert len(deadlines._answers) == MOST_SIZES


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["gap", "first", "late gap", "late first"]), st.floats(0, 1e4), st.floats(0, 100))
    )
)
def test_the_bounds_hold_whatever_was_seen(events):
    deadlines, now = LearnedDeadlines(), 0.0
    for what, seconds, pause in events:
        now += pause
        match what:
            case "gap":
                deadlines.saw_gap(R, seconds, now)
            case "first":
                deadlines.saw_first_token(R, seconds, 5.0, now)
            case "late gap":
                deadlines.gave_up_gap(R)
            case _:
                deadlines.gave_up_first(R)
        assert GAP_LEAST_SECONDS <= deadlines.gap(R, now) <= GAP_MOST_SECONDS
        assert FIRST_LEAST_SECONDS <= deadlines.first_token(R, 0.0, now) <= FIRST_MOST_SECONDS


@settings(max_examples=25)
@given(st.lists(st.floats(0, 100), min_size=HEDGE_SAMPLES, max_size=WINDOW))
def test_the_percentile_is_the_nearest_rank(seconds):
    deadlines = LearnedDeadlines()
    for each in seconds:
        deadlines.saw_answer("m", 1.0, each, 0.0)
    found = deadlines.answer_p95("m", 1.0, 0.0)
    assert sum(each <= found for each in seconds) >= 0.95 * len(seconds)
    assert sum(each < found for each in seconds) < 0.95 * len(seconds)
