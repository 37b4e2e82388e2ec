"""How fast a replica is while it is saturated, and what a new call would wait."""

import random

import pytest

from tars.core.expected_wait import Margin, ServiceRate, latest_start, seconds_of, units_ahead


def run(rate, *, running, seconds_a_call, units, until, own=0.0, saturated=True):
    """So many calls at once, each begun when one ended, as a replica that shares itself evenly answers them; staggered."""
    now = own
    rate.note(running, saturated, now)
    calls = [(now + seconds_a_call * (index + 1) / running, rate.started(now)) for index in range(running)]
    while calls[0][0] <= until:
        ends, start = calls.pop(0)
        rate.ended(start, units * (ends - start.at) / seconds_a_call, ends)
        rate.note(running, saturated, ends)
        calls.append((ends + seconds_a_call, rate.started(ends)))


def test_nothing_is_known_before_anything_was_measured():
    assert ServiceRate().per_second(None) is None
    assert seconds_of(1000.0, None) == 0.0


def test_the_replica_s_own_word_counts_until_it_was_measured():
    rate = ServiceRate()
    assert rate.per_second(100.0) == 100.0
    # Four at once, each 50 units in 10 s: 20 a second, a fifth of what the replica said.
    run(rate, running=4, seconds_a_call=10.0, units=50.0, until=100.0)
    assert rate.per_second(100.0) == pytest.approx(20.0, rel=0.5)
    assert rate.per_second(None) == pytest.approx(20.0, rel=0.1)


def test_a_replica_whose_answers_take_long_does_not_look_slow_before_the_first_of_them_ended():
    rate = ServiceRate()
    rate.note(4, True, 0.0)
    starts = [rate.started(0.0) for _ in range(4)]
    rate.note(4, True, 30.0)
    assert rate.per_second(10.0) == 10.0
    rate.ended(starts[0], 75.0, 30.0)
    assert rate.per_second(10.0) == pytest.approx(10.0)


def test_calls_of_an_idle_replica_say_nothing_of_what_it_can_do():
    rate = ServiceRate()
    run(rate, running=1, seconds_a_call=1.0, units=10.0, until=50.0, saturated=False)
    assert rate.per_second(None) is None
    assert rate.per_second(40.0) == 40.0


def test_of_a_call_that_came_to_an_idle_replica_only_the_saturated_part_counts():
    rate = ServiceRate()
    rate.note(1, False, 0.0)
    start = rate.started(0.0)
    rate.note(1, True, 8.0)
    rate.ended(start, 100.0, 10.0)
    assert rate.per_second(None) == pytest.approx(10.0)


def test_a_replica_that_became_slower_shows_it_within_the_horizon():
    rate = ServiceRate()
    run(rate, running=2, seconds_a_call=2.0, units=100.0, until=60.0)
    before = rate.per_second(None)
    run(rate, running=2, seconds_a_call=8.0, units=100.0, until=120.0, own=60.0)
    assert before == pytest.approx(100.0, rel=0.1)
    assert rate.per_second(None) < 35.0


def test_calls_of_unlike_lengths_give_the_rate_of_all_of_them_together():
    """An event simulation of a replica that shares 100 units a second among five calls."""
    rng = random.Random(7)
    rate, now, left = ServiceRate(), 0.0, []
    for _ in range(2000):
        while len(left) < 5:
            units = rng.choice([1.0, 5.0, 200.0])
            left.append([units, units, rate.started(now)])
        rate.note(len(left), True, now)
        shortest = min(left, key=lambda each: each[0])
        step = shortest[0] * len(left) / 100.0
        now += step
        for each in left:
            each[0] -= step * 100.0 / len(left)
        left.remove(shortest)
        rate.ended(shortest[2], shortest[1], now)
    assert rate.per_second(None) == pytest.approx(100.0, rel=0.1)


def test_the_wait_is_what_goes_before_and_the_next_end():
    assert units_ahead(100.0, 40.0, 4) == 110.0
    assert units_ahead(0.0, 0.0, 0) == 0.0
    assert seconds_of(110.0, 10.0) == 11.0


def test_the_margin_is_what_nearly_all_stay_under():
    rng = random.Random(3)
    margin = Margin()
    assert margin.most == 2.0, "before anything was seen"
    for _ in range(300):
        margin.saw(10.0, 10.0 * rng.expovariate(1.0))
    over = sum(rng.expovariate(1.0) > margin.most for _ in range(2000)) / 2000
    assert over < 0.06
    assert margin.mean == pytest.approx(1.0, abs=0.5)
    for _ in range(300):
        margin.saw(10.0, 10.0)
    assert margin.most == pytest.approx(1.0, abs=0.05)


def test_what_was_broken_off_raises_the_margin_and_never_lowers_it():
    margin = Margin()
    margin.saw(10.0, 1.0, whole=False)
    margin.saw(0.0, 1.0)
    assert margin.most == 2.0
    margin.saw(10.0, 1000.0, whole=False)
    assert 2.0 < margin.most < 10.0, "one says only so much"


def test_room_is_kept_for_the_answer_but_at_most_half_of_the_time():
    assert latest_start(10.0, 2.0) == 8.0
    assert latest_start(10.0, 30.0) == 5.0
