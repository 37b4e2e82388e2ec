"""How much is done twice, and how long is waited."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.hedging import EXTRA_PART, MOST_SAVED_UNITS, HedgeBudget, full_jitter


def test_nothing_is_done_twice_before_something_was_answered():
    budget = HedgeBudget()
    assert not budget.may_hedge(1.0)
    budget.answered(20.0)
    assert budget.may_hedge(1.0)
    budget.take(1.0)
    assert not budget.may_hedge(1.0)
    assert (budget.extra_units, budget.saved) == (1.0, 0.0)


def test_a_large_call_waits_until_there_is_room_for_all_of_it():
    budget = HedgeBudget()
    budget.answered(10_000.0)
    assert not budget.may_hedge(501.0)
    assert budget.may_hedge(500.0)


def test_a_long_quiet_time_saves_only_so_much():
    budget = HedgeBudget()
    budget.answered(1e9)
    assert budget.saved == MOST_SAVED_UNITS


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 1e4)), max_size=200))
def test_extra_work_is_never_more_than_its_part(events):
    budget, answered = HedgeBudget(), 0.0
    for is_answer, units in events:
        if is_answer:
            answered += units
            budget.answered(units)
        elif budget.may_hedge(units):
            budget.take(units)
        assert budget.extra_units <= EXTRA_PART * answered + 1e-6
        assert budget.saved >= 0


def test_backoff_is_spread_from_nothing_to_its_doubled_bound():
    class Most:
        def random(self):
            return 1.0

    assert [full_jitter(attempt, Most()) for attempt in range(8)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert full_jitter(10_000, Most()) == 2.0
    rng = random.Random(1)
    waits = [full_jitter(3, rng) for _ in range(1000)]
    assert 0 <= min(waits) < 0.01
    assert 0.39 < max(waits) < 0.4
    assert 0.18 < sum(waits) / len(waits) < 0.22
