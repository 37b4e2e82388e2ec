"""What each kind of failure means for the call that met it."""

import pytest

from tars.core.call_effects import DEADLINE, LATE, Failure
from tars.core.retry_rules import (
    AVOID_OVERLOADED_SECONDS,
    Blame,
    lesson_of,
    may_go_on,
    may_have_killed,
    needs_budget,
)


@pytest.mark.parametrize(
    "failure",
    [
        Failure("bad_grammar", retryable=False, callers_fault=True),
        Failure("prompt_too_long", retryable=True, callers_fault=True),
        Failure("internal", retryable=False),
        Failure("cancelled", retryable=True),
        Failure("deadline_exceeded", retryable=True),
        DEADLINE,
    ],
)
def test_what_another_try_cannot_help_is_never_tried_again(failure):
    assert not may_go_on(failure)
    assert lesson_of(failure) is None


@pytest.mark.parametrize("kind", ["stale_route", "unknown_model"])
def test_a_peer_that_knows_less_than_its_advert_is_a_reason_to_ask_another(kind):
    assert may_go_on(Failure(kind, retryable=False, callers_fault=kind == "unknown_model"))


@pytest.mark.parametrize(
    ("kind", "costs"),
    [("overloaded", True), (LATE, True), ("worker_crashed", False), ("peer_unreachable", False), ("draining", False)],
)
def test_only_what_says_too_much_work_is_paid_from_the_budget(kind, costs):
    assert needs_budget(Failure(kind)) is costs


@pytest.mark.parametrize(
    ("failure", "suspected"),
    [
        (Failure("worker_crashed", sent=True), True),
        (Failure("peer_unreachable", sent=True), True),
        (Failure("peer_unreachable", sent=False), False),
        (Failure("peer_unreachable", sent=True, known=True), False),
        (Failure("draining", sent=True), False),
    ],
)
def test_a_call_is_suspected_of_what_ended_under_it_unless_the_mesh_knows_why(failure, suspected):
    assert may_have_killed(failure) is suspected


def test_a_lost_peer_is_the_nodes_and_a_crash_the_replicas():
    lost, crashed, full = (lesson_of(Failure(kind)) for kind in ("peer_unreachable", "worker_crashed", "overloaded"))
    assert (lost.blame, crashed.blame, full.blame) == (Blame.NODE, Blame.REPLICA, Blame.REPLICA)
    assert crashed.cache_lost
    assert not full.cache_lost
    assert not lesson_of(Failure(LATE)).cache_lost


def test_a_full_replica_is_left_alone_for_as_long_as_it_says_within_bounds():
    assert lesson_of(Failure("overloaded", retry_after=0.3)).seconds == 0.3
    assert lesson_of(Failure("overloaded", retry_after=60.0)).seconds == AVOID_OVERLOADED_SECONDS
    assert lesson_of(Failure("overloaded")).seconds > 0
