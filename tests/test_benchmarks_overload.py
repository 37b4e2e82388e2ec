"""What `scripts/bench overload` makes of the calls that it saw."""

import random

from overload import BATCH_PART, MODEST_PART, Load, Seen, _poisson, aims_of, summarise


def load_of(*seen, seconds=10.0, factor=5.0):
    return summarise(factor, seconds, seen)


def missed(load, capacity):
    return [aim.what for aim in aims_of("x", capacity, [load]) if not aim.reached]


FAIR = [
    *(Seen("greedy", "answered", 0.5, 10.0) for _ in range(60)),
    *(Seen("greedy", "overloaded", 0.01) for _ in range(400)),
    *(Seen("modest", "answered", 0.4, 10.0) for _ in range(20)),
    *(Seen("batch", "answered", 0.9, 10.0) for _ in range(10)),
    *(Seen("batch", "overloaded", 0.02) for _ in range(20)),
]


def test_what_was_answered_refused_and_late_is_counted_by_caller():
    load = load_of(*FAIR, Seen("greedy", "deadline_exceeded", 2.0))
    assert (load.offered, load.answered, load.units) == (51.1, 9.0, 90.0)
    assert load.kinds == {"answered": 90, "overloaded": 420, "deadline_exceeded": 1}
    assert load.part_answered["modest"] == 1.0
    assert load.part_of_all["batch"] == 10 / 90
    assert load.late_part == 1 / 91
    assert (load.accepted_p50_ms, load.accepted_p99_ms, load.refused_p99_ms) == (500.0, 900.0, 20.0)


def test_each_aim_is_missed_by_what_it_is_about():
    assert missed(load_of(*FAIR), 90.0) == []
    assert "throughput at 5 times" in missed(load_of(*FAIR), 150.0)[0]
    assert "modest" in missed(load_of(*FAIR, *[Seen("modest", "overloaded", 0.01)] * 5), 90.0)[0]
    assert "not answered in time" in missed(load_of(*FAIR, *[Seen("greedy", "deadline_exceeded", 2.0)] * 9), 90.0)[0]
    assert "refusals" in missed(load_of(*FAIR, *[Seen("greedy", "overloaded", 3.0)] * 900), 90.0)[0]
    assert "internal" in missed(load_of(*FAIR, Seen("greedy", "internal", 0.1)), 90.0)[0]
    nobody = [each for each in FAIR if each.caller != "batch"] + [Seen("batch", "overloaded", 0.01)]
    assert "batch" in missed(load_of(*nobody), 80.0)[0]


def test_a_load_without_answers_is_a_load_and_no_fault():
    load = load_of(Seen("modest", "overloaded", 0.1), Seen("batch", "overloaded", 0.1))
    assert isinstance(load, Load)
    assert len(missed(load, 10.0)) == 3


def test_calls_come_at_the_rate_that_was_asked_for():
    arrivals = list(_poisson(random.Random(1), "a", 50.0, 100.0))
    assert 4500 < len(arrivals) < 5500
    assert all(0 <= at < 100 for at, _ in arrivals)
    assert list(_poisson(random.Random(1), "a", 0.0, 100.0)) == []
    assert MODEST_PART + BATCH_PART < 1
