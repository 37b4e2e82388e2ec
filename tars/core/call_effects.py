"""What a call's machine is told of a call, what it wants done, and what it keeps of each attempt.

Law of this file: values only, no decisions; those are `call_machine`'s, and what a failure means is `retry_rules`'.

An *attempt* is one replica that was asked. A *break* is the end of an attempt that had given tokens; what goes on after it elsewhere is a
*continuation*. A *hedge* is a second attempt beside a running one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tars.core.prefix_affinity import Block
from tars.core.replica_ledger import Reservation
from tars.core.routing import USUAL, Demand, Ranked
from tars.core.types import NodeId, ReplicaId

Tokens = tuple[int, ...]
"""The token ids of one answer, the first one first."""

Why = Literal["first", "retry", "hedge", "continuation"]
"""Why a replica was asked: the four kinds of attempts that are counted apart."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """A call as far as its machine cares. `deadline` is on the monotonic clock, in seconds."""

    key: str
    """The trace id; ties between replicas are broken by it."""
    model: str
    deadline: float
    streams: bool
    """It generates tokens: it may be continued. False: its answer comes in one piece, and it may be hedged."""
    demand: Demand = USUAL
    blocks: tuple[Block, ...] = ()
    answers: int = 1
    """How many (`n`)."""
    forwarded: bool = False
    """It came from a peer, whose gateway is in charge of it: this node's own replicas are asked once, and nothing is waited for."""
    shown: bool = True
    """The caller sees tokens as they come. False: they may be given up for an answer from another file, where nobody has this one."""
    file_sha256: str | None = None
    """Of a forwarded call that is a continuation: what its tokens were computed from. Nobody else goes on with them."""
    exact: bool = False
    """What an exact replica began goes on only where it is exact, too."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended without an answer. `kind` is the error's stable key (`tars.errors`)."""

    kind: str
    retryable: bool = True
    sent: bool = False
    """The work may have run there."""
    retry_after: float | None = None
    """Seconds, by its own word."""
    callers_fault: bool = False
    known: bool = False
    """The mesh knows why, and it is not this call's doing: its node is dead, frozen, being drained, or handed the call over."""
    saved: object | None = None
    """The state that the serving node saved of it: goes into the next `Start`, opaque."""
    error: object | None = field(default=None, compare=False)
    """The driver's own; comes back in `Fail`."""


NO_REPLICA = Failure("no_replica")
"""Nobody has a replica that may take the call: the driver knows why (`Fleet.not_ready`)."""
DEADLINE = Failure("deadline_exceeded", retryable=False)
"""The call's time is over."""


# --- effects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Run the call at `reservation.replica`. `resume`: the token ids that each answer has so far; None: from the beginning."""

    attempt: int
    reservation: Reservation
    resume: tuple[Tokens, ...] | None = None
    saved: object | None = None
    """A saved state that holds `resume` and perhaps more."""
    file_sha256: str | None = None
    """What `resume` was computed from, and else what the replica that was chosen has, where it is known: a peer is told, and answers only
    from that."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancel this attempt: nothing that still comes from it counts."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Call `tick` at this time. It replaces an earlier one that is not due yet."""

    at: float


@dataclass(frozen=True, slots=True)
class AskToLoad:
    """Nobody has a ready replica: make the mesh load one, and call `fleet_changed` when candidates changed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """This attempt's finished event is the call's answer. The call is over."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The call ends badly. It is over."""

    failure: Failure


Effect = Start | Stop | Wake | AskToLoad | Answer | Fail


# --- what is kept -------------------------------------------------------------------------------------------------------

RUNNING = "running"
ANSWERED = "answered"
LATE = "late"
LOST_RACE = "hedge_lost"
CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class AttemptRecord:
    """One replica that was asked: for metadata and `tars explain call`. Times are monotonic, in seconds."""

    replica: ReplicaId
    node: NodeId
    started: float
    because: str
    """Why there was this attempt: `first choice`, `after worker_crashed`, `hedge`, `continued after peer_unreachable`."""
    ranked: Ranked = field(repr=False)
    outcome: str = RUNNING
    """`answered`, the failure's kind, `late`, `hedge_lost`, `cancelled`; `running` until it ended."""
    ended: float | None = None
    tokens: int = 0
    """That it gave, of all answers."""
    hedge: bool = False
    continued: bool = False
    """It went on from tokens of earlier attempts."""

    def why(self, number: int) -> Why:
        """The same as a word to count by; `number`: its place among the call's attempts, from 0."""
        return "hedge" if self.hedge else "continuation" if self.continued else "retry" if number else "first"

    @property
    def reason(self) -> str:
        """One line for people: why it was asked, and how it stood among the others. Made when it is asked for."""
        stood = self.ranked.reasons.get(self.replica)
        return f"{self.because}; {stood}" if stood else self.because
