"""No retry storms."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.retry_budget import AT_START, MOST_SAVED, SHARE, RetryBudget


def test_it_starts_with_some_and_is_empty_then():
    budget = RetryBudget()
    assert [budget.may_retry() for _ in range(12)] == [True] * 10 + [False] * 2
    assert (budget.taken, budget.refused, budget.saved) == (10, 2, 0.0)


def test_five_calls_give_one_further_attempt():
    budget = RetryBudget()
    while budget.may_retry():
        pass
    for calls in range(20):
        assert not budget.may_retry(), calls
        for _ in range(5):
            budget.call()
        assert budget.may_retry()


def test_a_long_quiet_time_saves_only_so_much():
    budget = RetryBudget()
    for _ in range(10_000):
        budget.call()
    assert sum(budget.may_retry() for _ in range(1000)) == MOST_SAVED


@settings(max_examples=25)
@given(st.lists(st.booleans(), max_size=500))
def test_attempts_never_exceed_what_the_calls_allow(events):
    budget, calls, taken = RetryBudget(), 0, 0
    for is_call in events:
        if is_call:
            calls += 1
            budget.call()
        else:
            taken += budget.may_retry()
        assert 0 <= budget.saved <= MOST_SAVED
        assert taken <= AT_START + SHARE * calls + 1e-6
