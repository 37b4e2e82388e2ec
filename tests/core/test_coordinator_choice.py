"""Who coordinates."""

import pytest

from tars.core.coordinator_choice import Candidate, coordinator_of
from tars.core.types import NodeId


@pytest.mark.parametrize(
    ("candidates", "coordinator"),
    [
        ([], None),
        ([("b", 0, False), ("a", 0, False)], "a"),
        ([("a", 0, False), ("b", 5, False)], "b"),
        ([("a", -1, False), ("b", 0, False)], "b"),
        ([("a", 9, True), ("b", 0, False)], "b"),
        ([("b", 1, True), ("a", 0, True)], "b"),
    ],
)
def test_who_coordinates(candidates, coordinator):
    assert coordinator_of(Candidate(NodeId(node), *more) for node, *more in candidates) == coordinator
