"""When a node that coordinates begins to give orders, as a table of times."""

import pytest

from tars.core.mesh_events import MeshView
from tars.core.taking_over import ISOLATED_SECONDS, TAKE_OVER_SECONDS, TakingOver
from tars.core.types import NodeId

OWN, OTHER = NodeId("a"), NodeId("b")


def seen(coordinator=OWN, *, alone=False, isolated=False):
    return MeshView({} if alone else {OTHER: object()}, coordinator, isolated)


@pytest.mark.parametrize(
    ("view", "due"),
    [
        (seen(), 100 + TAKE_OVER_SECONDS),
        (seen(alone=True), 100),
        (seen(isolated=True), 100 + ISOLATED_SECONDS),
        (seen(OTHER), None),
        (seen(None), None),
    ],
)
def test_it_waits_until_it_knows_the_others_and_longer_where_it_lost_them_all(view, due):
    assert TakingOver().due(view, OWN, 100) == due


def test_the_time_runs_from_when_it_began_and_begins_anew_after_another_coordinated():
    taking_over = TakingOver()
    assert taking_over.due(seen(), OWN, 100) == taking_over.due(seen(), OWN, 150) == 100 + TAKE_OVER_SECONDS
    assert taking_over.due(seen(OTHER), OWN, 200) is None
    assert taking_over.due(seen(), OWN, 300) == 300 + TAKE_OVER_SECONDS


def test_one_that_coordinated_before_waits_too_when_it_loses_sight_of_everybody():
    taking_over = TakingOver()
    taking_over.due(seen(), OWN, 100)
    assert taking_over.due(seen(isolated=True), OWN, 200) == 200 + ISOLATED_SECONDS
    assert taking_over.due(seen(isolated=True), OWN, 203) == 200 + ISOLATED_SECONDS
    assert taking_over.due(seen(), OWN, 204) == 100 + TAKE_OVER_SECONDS
    assert taking_over.due(seen(isolated=True), OWN, 300) == 300 + ISOLATED_SECONDS


def test_being_cut_off_counts_from_its_beginning_also_where_another_coordinated_then():
    taking_over = TakingOver()
    assert taking_over.due(seen(OTHER, isolated=True), OWN, 100) is None
    assert taking_over.due(seen(isolated=True), OWN, 103) == 100 + ISOLATED_SECONDS
