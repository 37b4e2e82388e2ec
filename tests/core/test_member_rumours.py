"""News is told O(log n) times, the least told first, the newest of a node only."""

import pytest

from tars.core.member_rumours import MemberRumours, tellings
from tars.core.mesh_messages import MemberState, Update


def update(node, incarnation=0):
    return Update(node, incarnation, MemberState.ALIVE)


@pytest.mark.parametrize(("peers", "times"), [(0, 3), (1, 3), (2, 3), (9, 4), (99, 8), (999, 12), (1000, 13)])
def test_how_often(peers, times):
    assert tellings(peers) == times
    rumours = MemberRumours()
    rumours.add(update("a"))
    told = 0
    while rumours.take(10, peers):
        told += 1
    assert told == times
    assert len(rumours) == 0


def test_the_least_told_first_and_no_more_than_there_is_room():
    rumours = MemberRumours()
    rumours.add(update("a"))
    rumours.take(1, 9)
    for node in "bc":
        rumours.add(update(node))
    assert {each.node for each in rumours.take(2, 9)} == {"b", "c"}
    assert rumours.take(0, 9) == []


def test_of_what_was_told_as_often_the_one_that_waits_longest_comes_first():
    rumours = MemberRumours()
    for node in "cba":
        rumours.add(update(node))
    told = [rumours.take(1, 9, without)[0].node for without in ("", "b", "", "", "", "")]
    assert told == ["c", "a", "b", "c", "a", "b"]


def test_a_newer_one_takes_the_place_and_is_told_afresh():
    rumours = MemberRumours()
    rumours.add(update("a", 1))
    for _ in range(3):
        rumours.take(1, 9)
    rumours.add(update("a", 2))
    assert [rumours.take(1, 9)[0].incarnation for _ in range(4)] == [2, 2, 2, 2]
    assert rumours.take(1, 9) == []


def test_nobody_is_told_about_himself_and_forgotten_ones_are_not_told():
    rumours = MemberRumours()
    rumours.add(update("a"))
    assert rumours.take(5, 9, {"a"}) == []
    rumours.forget("a")
    assert rumours.take(5, 9) == []
