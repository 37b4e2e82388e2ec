"""What follows from what one node knows of another."""

import pytest

from tars.core.mesh_messages import MemberState, Update
from tars.core.peer import LIVE, MOST_ADDRESSES, OWN, UNHEARD, Peer, Suspicion
from tars.core.timers import Timers
from tars.core.types import NodeId


def peer(state=MemberState.ALIVE, incarnation=3, **more):
    return Peer(NodeId("n"), state, incarnation, 0.0, ("recorded:1",), **more)


def test_its_own_word_about_its_addresses_goes_first_and_none_is_there_twice():
    assert peer(told=("told:1", "recorded:1"), found=("found:1", "told:1")).addresses == (
        "told:1",
        "recorded:1",
        "found:1",
    )
    assert len(peer(told=tuple(f"a:{number}" for number in range(99))).addresses) == MOST_ADDRESSES


@pytest.mark.parametrize(
    ("state", "behind", "told"),
    [
        (MemberState.ALIVE, False, False),
        (MemberState.DRAINING, False, False),
        (MemberState.SUSPECT, False, True),
        (MemberState.DEAD, False, True),
        (MemberState.LEFT, False, True),
        (MemberState.ALIVE, True, True),
    ],
)
def test_who_must_hear_what_is_held_of_it(state, behind, told):
    assert peer(state, behind=behind).must_be_told is told


def test_what_is_told_of_it_names_an_accuser_and_never_a_negative_incarnation():
    assert peer(told=("told:1",)).update() == Update(NodeId("n"), 3, MemberState.ALIVE, ("told:1",))
    suspected = peer(MemberState.SUSPECT, UNHEARD)
    suspected.suspicion = Suspicion(0.0, {NodeId("b"), NodeId("a")}, Timers().at(1.0, lambda now: None))
    assert suspected.update() == Update(NodeId("n"), 0, MemberState.SUSPECT, accuser=NodeId("a"))


def test_every_state_is_live_or_its_own_or_death():
    assert set(MemberState) - {MemberState.DEAD} == LIVE | OWN
