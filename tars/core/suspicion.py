"""How long a suspected node has to refute, and which of two claims about a node stands.

Law of this file: pure arithmetic and one table; elapsed time is an argument. Sources: memberlist's `suspicion.go` for the timing, which is
Lifeguard's (Dadgar, Phillips, Currey, 2017, section IV-B); SWIM (Das, Gupta, Motivala, 2002, section 4.2) for the claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from tars.core.mesh_messages import MemberState

RANK: Mapping[MemberState, int] = {
    MemberState.ALIVE: 0,
    MemberState.DRAINING: 0,
    MemberState.SUSPECT: 1,
    MemberState.DEAD: 2,
    MemberState.LEFT: 3,
}
"""Of two claims of one incarnation the higher rank stands. ALIVE and DRAINING never share one: the node raises it when it changes."""


def overrules(incarnation: int, state: MemberState, held_incarnation: int, held_state: MemberState) -> bool:
    """Whether a claim about a node replaces the one that is held. The same claim again replaces nothing."""
    return (incarnation, RANK[state]) > (held_incarnation, RANK[held_state])


def suspicion_seconds(confirmations: int, wanted: int, shortest: float, longest: float) -> float:
    """How long a suspicion lasts in all, with so many confirmations beside the first accuser.

    longest - (longest - shortest) * log(confirmations + 1) / log(wanted + 1): the first confirmation shortens it most. Where nobody else
    could confirm (`wanted` 0), it is the shortest from the start.
    """
    if wanted < 1 or confirmations >= wanted:
        return shortest
    return longest - (longest - shortest) * log(confirmations + 1) / log(wanted + 1)
