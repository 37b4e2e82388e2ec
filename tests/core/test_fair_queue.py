"""Who is served next: shares of callers and priorities, what a full queue drops, and the prediction of what goes before."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.fair_queue import BATCH, INTERACTIVE, MOST_IDLE_CALLERS, Entry, FairQueue


def entry(caller, units=1.0, priority=INTERACTIVE):
    return Entry(caller, priority, units)


def served(queue, number):
    """Callers in the order in which the next `number` are served."""
    return [queue.take().caller for _ in range(number)]


def test_a_greedy_caller_s_flood_holds_nobody_else_up():
    queue = FairQueue(100)
    for _ in range(50):
        assert queue.add(entry("greedy")) is None
    served(queue, 5)
    queue.add(entry("modest"))
    assert "modest" in served(queue, 2)


def test_callers_get_equal_units_however_their_calls_are_cut():
    queue = FairQueue(1000)
    for _ in range(400):
        queue.add(entry("small", 1.0))
    for _ in range(100):
        queue.add(entry("large", 8.0))
    units = {"small": 0.0, "large": 0.0}
    while units["small"] < 200:
        taken = queue.take()
        units[taken.caller] += taken.units
    assert abs(units["small"] - units["large"]) <= 8.0


def test_one_caller_s_own_calls_are_served_in_their_order():
    queue = FairQueue(10)
    entries = [entry("a", units) for units in (5.0, 1.0, 3.0)]
    for each in entries:
        queue.add(each)
    assert [queue.take() for _ in range(3)] == entries
    with pytest.raises(IndexError):
        queue.take()


def test_who_was_away_saves_nothing_up():
    queue = FairQueue(100)
    for _ in range(50):
        queue.add(entry("busy"))
    served(queue, 30)
    for _ in range(20):
        queue.add(entry("back"))
    # Equal shares from now on, and no burst of thirty for having been away.
    assert served(queue, 20).count("back") == 10


def test_interactive_calls_go_first_and_batch_calls_still_get_a_tenth():
    queue = FairQueue(1000)
    for _ in range(300):
        queue.add(entry("person"))
        queue.add(entry("night job", priority=BATCH))
    order = served(queue, 200)
    assert order[0] == "person"
    assert 15 <= order.count("night job") <= 25
    served(queue, 160)
    assert queue.waiting(INTERACTIVE) == 0 or queue.waiting(BATCH) > queue.waiting(INTERACTIVE)


def test_batch_work_has_all_of_an_idle_replica_and_owes_nothing_for_it():
    queue = FairQueue(100)
    for _ in range(30):
        queue.add(entry("night job", priority=BATCH))
    assert served(queue, 20) == ["night job"] * 20
    for _ in range(10):
        queue.add(entry("person"))
    # What it had alone is no debt: its tenth goes on.
    assert served(queue, 10).count("night job") <= 2
    assert len(queue) == 10


def test_what_cost_more_than_was_predicted_is_charged_later():
    queue = FairQueue(100)
    for _ in range(20):
        queue.add(entry("long answers"))
        queue.add(entry("short answers"))
    served(queue, 2)
    queue.charge("long answers", INTERACTIVE, 5.0)
    assert served(queue, 5).count("short answers") == 5
    assert served(queue, 10).count("long answers") == 5


def test_what_cost_more_than_was_predicted_is_charged_to_its_priority_too():
    queue = FairQueue(200)
    for _ in range(60):
        queue.add(entry("person"))
        queue.add(entry("night job", priority=BATCH))
    assert "night job" in served(queue, 20)
    queue.charge("night job", BATCH, 3.0)
    assert served(queue, 25) == ["person"] * 25


def test_a_caller_who_was_served_at_once_is_behind_one_who_comes_fresh():
    queue = FairQueue(100)
    for _ in range(10):
        queue.pass_by(entry("greedy"))
    queue.add(entry("greedy"))
    queue.add(entry("modest"))
    assert served(queue, 2) == ["modest", "greedy"]


def test_a_full_queue_drops_the_newest_call_of_who_has_the_most_in_it():
    queue = FairQueue(4)
    flood = [entry("greedy") for _ in range(4)]
    for each in flood:
        queue.add(each)
    assert queue.add(last := entry("greedy")) is last
    assert queue.add(entry("modest")) is flood[3]
    assert queue.add(entry("modest")) is flood[2]
    # Now both have two: nobody gains a place at the other's cost.
    assert queue.add(third := entry("modest")) is third
    assert len(queue) == 4


def test_a_full_queue_drops_batch_work_for_interactive_work_and_never_the_reverse():
    queue = FairQueue(3)
    batch = [entry("night job", priority=BATCH) for _ in range(3)]
    for each in batch:
        queue.add(each)
    assert queue.add(entry("night job")) is batch[2]
    served(queue, 3)
    for _ in range(3):
        queue.add(entry("person"))
    assert queue.add(late := entry("somebody", priority=BATCH)) is late


def test_a_call_that_is_cancelled_leaves_and_is_not_charged():
    queue = FairQueue(10)
    gone = entry("a", 100.0)
    queue.add(gone)
    queue.add(entry("a"))
    queue.add(entry("b"))
    assert queue.remove(gone)
    assert not queue.remove(gone)
    assert sorted(served(queue, 2)) == ["a", "b"]
    assert not queue.remove(gone)


def test_what_goes_before_a_call_is_known_when_it_comes():
    queue = FairQueue(100)
    for _ in range(20):
        queue.add(entry("greedy", 2.0))
    assert queue.units_before("greedy", INTERACTIVE) == 40.0
    assert queue.units_before("modest", INTERACTIVE) == 0.0
    assert queue.units_before("night job", BATCH) <= 2.0
    for _ in range(3):
        queue.add(entry("modest", 2.0))
    assert queue.units_before("modest", INTERACTIVE) == 12.0


def test_counters_of_those_who_are_gone_are_not_kept_for_ever():
    queue = FairQueue(1)
    for number in range(3 * MOST_IDLE_CALLERS):
        queue.pass_by(entry(f"caller {number}"))
        queue.pass_by(entry("always"))
    assert len(queue._classes[INTERACTIVE].idle) <= MOST_IDLE_CALLERS


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_whatever_comes_and_goes_the_bound_holds_and_nothing_is_lost_or_served_twice(seed, most):
    rng = random.Random(seed)
    queue, inside, done = FairQueue(most), set(), []
    for _ in range(150):
        match rng.choice(["add", "add", "take", "remove", "charge", "pass"]):
            case "add":
                new = entry(rng.choice("abc"), rng.uniform(0, 9), rng.choice([INTERACTIVE, BATCH]))
                inside.add(new)
                if (gone := queue.add(new)) is not None:
                    inside.remove(gone)
            case "take" if inside:
                assert queue.first() in inside
                inside.remove(queue.take())
            case "remove" if inside:
                left = rng.choice(list(inside))
                assert queue.remove(left)
                inside.remove(left)
            case "charge":
                queue.charge(rng.choice("abc"), rng.choice([INTERACTIVE, BATCH]), rng.uniform(-5, 5))
            case "pass" if not inside:
                queue.pass_by(entry(rng.choice("abc")))
        assert set(queue) == inside
        assert len(queue) == len(inside) <= most
        assert sum(queue.waiting(kind) for kind in (INTERACTIVE, BATCH)) == len(queue)
        for caller, kind in itertools.product("abz", (INTERACTIVE, BATCH)):
            before = queue.units_before(caller, kind)
            assert -1e-6 <= before <= sum(each.units for each in inside) + 1e-6
    done += [queue.take() for _ in range(len(queue))]
    assert set(done) == inside
    assert queue.first() is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_callers_who_always_have_work_get_equal_shares_whatever_their_calls_cost(seed, callers):
    """The bound of start-time fair queueing: over any time two backlogged callers differ by one call of each at most."""
    rng = random.Random(seed)
    most = 20.0
    queue = FairQueue(1000)
    given_units = dict.fromkeys(range(callers), 0.0)

    def another(caller):
        queue.add(entry(caller, rng.uniform(0.1, most)))

    for caller in given_units:
        another(caller)
        another(caller)
    for _ in range(300):
        taken = queue.take()
        given_units[taken.caller] += taken.units
        another(taken.caller)
    assert max(given_units.values()) - min(given_units.values()) <= 2 * most
