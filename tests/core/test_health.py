"""The circuit breaker."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.health import COOLDOWN_MOST_SECONDS, JITTER_PART, PROBE_MOST_SECONDS, Breaker, BreakerState


def test_it_is_closed_until_something_fails_and_half_open_after_the_cooldown():
    breaker = Breaker()
    assert (breaker.state(0.0), breaker.may_try(0.0), breaker.cooldown(0.0)) == (BreakerState.CLOSED, True, 0.0)
    breaker.failed(2.0, 10.0)
    assert (breaker.state(11.9), breaker.may_try(11.9)) == (BreakerState.OPEN, False)
    assert breaker.cooldown(11.5) == pytest.approx(0.5)
    assert (breaker.state(12.0), breaker.may_try(12.0), breaker.cooldown(12.0)) == (BreakerState.HALF_OPEN, True, 0.0)


def test_half_open_lets_one_call_at_a_time_find_out():
    breaker = Breaker()
    breaker.failed(2.0, 0.0)
    breaker.tried(3.0)
    assert not breaker.may_try(3.1)
    breaker.gave_up()
    assert breaker.may_try(3.2)
    breaker.tried(3.2)
    assert not breaker.may_try(3.2 + PROBE_MOST_SECONDS - 0.1)
    assert breaker.may_try(3.2 + PROBE_MOST_SECONDS), "a try that nobody ended stands in the way for a while only"
    breaker.succeeded()
    assert breaker.state(4.0) is BreakerState.CLOSED
    assert breaker.may_try(4.0)


def test_calls_through_a_closed_breaker_are_no_tries():
    breaker = Breaker()
    for _ in range(5):
        breaker.tried(0.0)
        assert breaker.may_try(0.0)


def test_each_failure_in_a_row_doubles_the_cooldown_and_a_success_forgives_all():
    breaker, now, seen = Breaker(), 0.0, []
    for _ in range(6):
        breaker.failed(2.0, now)
        seen.append(breaker.cooldown(now))
        now += seen[-1]
    assert seen == [2.0, 4.0, 8.0, 16.0, COOLDOWN_MOST_SECONDS, COOLDOWN_MOST_SECONDS]
    breaker.succeeded()
    breaker.failed(2.0, now)
    assert breaker.cooldown(now) == 2.0


def test_calls_that_break_together_are_one_failure():
    breaker = Breaker()
    for call in range(10):
        breaker.failed(2.0, call * 0.01)
    assert breaker.failures == 1
    assert breaker.cooldown(0.09) == pytest.approx(2.0), "from the last of them"


def test_it_was_opened_by_lateness_alone_until_something_worse_happens():
    breaker = Breaker()
    breaker.failed(2.0, 0.0, late=True)
    assert breaker.by_lateness
    breaker.failed(2.0, 1.0)
    assert not breaker.by_lateness
    breaker.failed(2.0, 1.5, late=True)
    assert not breaker.by_lateness, "what was worse is not forgotten"


def test_a_shorter_failure_does_not_shorten_what_is_open():
    breaker = Breaker()
    breaker.failed(5.0, 0.0)
    breaker.failed(0.1, 1.0)
    assert breaker.cooldown(1.0) == pytest.approx(4.0)


@settings(max_examples=25)
@given(st.integers(), st.floats(0.01, 100.0))
def test_jitter_only_lengthens_and_only_a_little(seed, seconds):
    breaker = Breaker(random.Random(seed))
    breaker.failed(seconds, 0.0)
    least = min(seconds, COOLDOWN_MOST_SECONDS)
    assert least <= breaker.cooldown(0.0) <= min(COOLDOWN_MOST_SECONDS, least * (1 + JITTER_PART) + 1e-9)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(["failed", "succeeded", "tried", "gave_up"]), st.floats(0, 40), st.floats(0, 9)))
)
def test_whatever_happens_it_is_half_open_within_the_longest_cooldown_and_works_once_it_succeeded(events):
    breaker, now = Breaker(), 0.0
    for what, pause, seconds in events:
        now += pause
        match what:
            case "failed":
                breaker.failed(seconds, now)
                assert breaker.failures > 0
            case "succeeded":
                breaker.succeeded()
                assert breaker.may_try(now)
            case "tried":
                breaker.tried(now)
            case _:
                breaker.gave_up()
        assert 0 <= breaker.cooldown(now) <= COOLDOWN_MOST_SECONDS + 1e-9  # a sum of floats rounds
        assert (breaker.state(now) is BreakerState.OPEN) == (breaker.cooldown(now) > 0)
    assert breaker.may_try(now + COOLDOWN_MOST_SECONDS + PROBE_MOST_SECONDS)
