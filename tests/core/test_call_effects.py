"""What is kept of an attempt is said to people in one line."""

from tars.core.call_effects import AttemptRecord, Failure
from tars.core.routing import Candidate, rank
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState


def record(replica, candidates, because):
    return AttemptRecord(ReplicaId(replica), NodeId("n"), 1.0, because, rank(candidates, "call"))


def test_an_attempts_reason_says_why_it_was_made_and_how_it_stood():
    ready = [
        Candidate(ReplicaId(name), "m", ModelKind.CHAT, ReplicaState.READY, speed=speed)
        for name, speed in (("fast", 90.0), ("slow", 9.0))
    ]
    assert record("slow", ready, "after worker_crashed").reason.startswith("after worker_crashed; rank 2: predicted")
    assert record("fast", ready, "first choice").reason.startswith("first choice; rank 1: predicted")
    assert record("gone", ready, "first choice").reason == "first choice"


def test_failures_are_compared_without_the_drivers_own_error():
    assert Failure("overloaded", error=ValueError("a")) == Failure("overloaded", error=ValueError("b"))
    assert Failure("overloaded") != Failure("overloaded", retry_after=1.0)
