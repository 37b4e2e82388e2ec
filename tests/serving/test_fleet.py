"""What a model without a ready replica is answered with."""

import pytest

from tars.core.types import ReplicaState
from tars.errors import Overloaded, ReplicaFailed, StillLoading
from tars.serving.fleet import draining_error, no_replica_error


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([ReplicaState.FAILED], ReplicaFailed),
        ([ReplicaState.FAILED, ReplicaState.LOADING], StillLoading),
        ([ReplicaState.RESTARTING], StillLoading),
        ([ReplicaState.STOPPING], Overloaded),
        ([], Overloaded),
    ],
)
def test_the_error_without_a_ready_replica_follows_from_the_states(states, expected):
    assert type(no_replica_error(states, "m")) is expected


def test_a_drained_node_is_worth_another_try_a_little_later():
    error = draining_error()
    assert error.retryable
    assert error.retry_after_ms > 0
