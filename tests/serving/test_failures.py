"""What an error of a target means to a call's machine."""

import math

import pytest

from tars.core.retry_rules import lesson_of, may_go_on, may_have_killed
from tars.errors import (
    BadGrammar,
    DeadlineExceeded,
    DoesNotFit,
    Draining,
    InvalidParams,
    Overloaded,
    PeerUnreachable,
    PromptTooLong,
    ReplicaFailed,
    StaleRoute,
    StillLoading,
    WorkerCrashed,
    from_json,
)
from tars.serving.failures import failure_of, worth_waiting


@pytest.mark.parametrize("error", [PromptTooLong("x"), BadGrammar("x"), InvalidParams("x"), DeadlineExceeded("x")])
def test_a_callers_own_mistake_and_a_call_whose_time_is_over_go_nowhere(error):
    assert not may_go_on(failure_of(error))
    assert failure_of(error).callers_fault is not isinstance(error, DeadlineExceeded)


@pytest.mark.parametrize(
    "error",
    [Overloaded("x"), StillLoading("x"), StaleRoute("x"), Draining("x"), WorkerCrashed("x"), PeerUnreachable("x")],
)
def test_what_is_the_servers_may_be_tried_elsewhere(error):
    assert may_go_on(failure_of(error))
    assert failure_of(error).error is error


@pytest.mark.parametrize(
    ("error", "killed"),
    [
        (WorkerCrashed("x"), True),
        (WorkerCrashed("x", details={"sent": False}), False),
        (PeerUnreachable("x"), True),
        (PeerUnreachable("x", details={"sent": False}), False),
        (PeerUnreachable("x", details={"sent": True, "silent": True}), False),
        (Draining("x"), False),
        (Overloaded("x"), False),
    ],
)
def test_only_what_ran_and_ended_for_no_known_reason_may_have_killed_its_worker(error, killed):
    assert may_have_killed(failure_of(error)) is killed


def test_how_long_to_wait_is_in_seconds():
    assert failure_of(Overloaded("x", retry_after_ms=1500)).retry_after == 1.5
    assert failure_of(Overloaded("x")).retry_after is None


def test_a_replica_that_would_begin_too_late_is_not_asked_again_by_the_same_call():
    refused = Overloaded("x", retry_after_ms=300, details={"reason": "late"})
    assert failure_of(refused).retry_after == math.inf
    assert failure_of(from_json(refused.to_json())).retry_after == math.inf
    lesson = lesson_of(failure_of(refused))
    assert lesson is not None
    assert lesson.seconds <= 1.0


def test_a_saved_state_comes_with_its_tokens_also_from_a_peer():
    error = Draining("x", details={"saved": {"node": "n"}, "tokens": [[1, 2]]})
    assert failure_of(error).saved == {"saved": {"node": "n"}, "tokens": [[1, 2]]}
    assert failure_of(from_json(error.to_json())).saved == {"saved": {"node": "n"}, "tokens": [[1, 2]]}
    assert failure_of(Draining("x")).saved is None


@pytest.mark.parametrize("error", [StillLoading("x"), PeerUnreachable("x"), Overloaded("x")])
def test_what_may_come_is_waited_for(error):
    assert worth_waiting(error)


@pytest.mark.parametrize("error", [ReplicaFailed("x"), DoesNotFit("x"), InvalidParams("x")])
def test_what_will_not_come_is_not(error):
    assert not worth_waiting(error)
