"""How long a suspicion lasts, and which claim stands: tables."""

import pytest

from tars.core.mesh_messages import MemberState
from tars.core.suspicion import overrules, suspicion_seconds

ALIVE, SUSPECT, DEAD, DRAINING, LEFT = (
    MemberState.ALIVE,
    MemberState.SUSPECT,
    MemberState.DEAD,
    MemberState.DRAINING,
    MemberState.LEFT,
)


@pytest.mark.parametrize(
    ("confirmations", "wanted", "seconds"),
    [
        # memberlist's own table (suspicion_test.go, TestSuspicion_remainingSuspicionTime), elapsed 0.
        (0, 3, 30.0),
        (1, 3, 16.0),
        (2, 3, 7.810),
        (3, 3, 2.0),
        (4, 3, 2.0),
        (5, 3, 2.0),
        # Nobody else could confirm.
        (0, 0, 2.0),
        (2, 0, 2.0),
    ],
)
def test_confirmations_shorten_a_suspicion_as_in_memberlist(confirmations, wanted, seconds):
    assert suspicion_seconds(confirmations, wanted, 2.0, 30.0) == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize(
    ("claim", "held", "stands"),
    [
        # A higher incarnation overrules everything, even death.
        ((2, ALIVE), (1, DEAD), True),
        ((2, ALIVE), (1, LEFT), True),
        ((1, LEFT), (2, ALIVE), False),
        ((1, DEAD), (2, SUSPECT), False),
        # Within one incarnation what is worse stands.
        ((1, SUSPECT), (1, ALIVE), True),
        ((1, SUSPECT), (1, DRAINING), True),
        ((1, DEAD), (1, SUSPECT), True),
        ((1, DEAD), (1, ALIVE), True),
        ((1, LEFT), (1, DEAD), True),
        ((1, ALIVE), (1, SUSPECT), False),
        ((1, ALIVE), (1, DEAD), False),
        ((1, SUSPECT), (1, DEAD), False),
        ((1, DEAD), (1, LEFT), False),
        # The same again is no news.
        ((1, ALIVE), (1, ALIVE), False),
        ((1, SUSPECT), (1, SUSPECT), False),
        # Whoever was never heard of is overruled by any first word.
        ((0, ALIVE), (-1, ALIVE), True),
        ((0, DEAD), (-1, ALIVE), True),
    ],
)
def test_which_claim_stands(claim, held, stands):
    assert overrules(*claim, *held) is stands
