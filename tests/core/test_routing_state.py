"""What calls share."""

import random

from tars.core.routing_state import RoutingState
from tars.core.types import NodeId


def test_two_nodes_share_nothing():
    one, two = RoutingState(), RoutingState()
    one.retries.may_retry()
    one.ledger.failed(NodeId("n"), 1.0, 0.0)
    assert two.retries.taken == 0
    assert two.ledger.breaker(NodeId("n"), 0.0) == "closed"


def test_cooldowns_are_spread_by_the_dice():
    state = RoutingState.with_dice(random.Random(1))
    state.ledger.failed(NodeId("n"), 10.0, 0.0)
    assert state.ledger.breaker(NodeId("n"), 10.0) == "open"
    assert state.ledger.breaker(NodeId("n"), 11.01) == "half-open"
