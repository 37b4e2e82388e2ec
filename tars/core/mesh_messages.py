"""What nodes send each other to stay one mesh: one envelope a packet, so that news rides along with every probe.

Law of this file: frozen values only. The network may lose, delay, double and reorder envelopes; nothing here relies on order.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tars.core.records import Value
from tars.core.types import NodeId


@dataclass(frozen=True, slots=True, order=True)
class Stamp:
    """A moment of a hybrid logical clock: later in the field order is later. Source: Kulkarni et al., "Logical Physical Clocks", 2014."""

    wall_ms: int
    """Unix time, ms, or the largest seen so far."""
    counter: int
    node: NodeId


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the replicated map. `value` None is a tombstone. Of two records of a key the one with the later stamp wins."""

    key: str
    stamp: Stamp
    value: Value | None


class MemberState(StrEnum):
    """How a node sees a peer (design, Words). LEFT said so itself; both LEFT and DEAD are not routed to."""

    ALIVE = "ALIVE"
    SUSPECT = "SUSPECT"
    DEAD = "DEAD"
    DRAINING = "DRAINING"
    LEFT = "LEFT"


@dataclass(frozen=True, slots=True)
class Update:
    """Gossip about one node: SWIM's alive, suspect, confirm. A higher incarnation overrules; only the node itself raises its own."""

    node: NodeId
    incarnation: int
    state: MemberState
    addresses: tuple[str, ...] = ()
    accuser: NodeId | None = None
    """Of SUSPECT and DEAD: whose own probe it failed. Several accusers make a suspicion shorter."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? Answered by `Ack` with the same number."""

    number: int


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Ask `target` for me, and tell me. Answered by `Ack` where it answered, by `Nack` where it did not in time."""

    number: int
    target: NodeId


@dataclass(frozen=True, slots=True)
class Ack:
    """The answer to `Ping` or `PingRequest`. `load` is the sender's own, so that routing knows queues without asking."""

    number: int
    load: tuple[tuple[str, int, int], ...] = ()
    """(replica, active calls, queued calls)."""


@dataclass(frozen=True, slots=True)
class Nack:
    """The asked-for target did not answer me either; I live, so the asker's own network is well."""

    number: int


@dataclass(frozen=True, slots=True)
class Compare:
    """One level of the comparison of two replicated maps: hashes of key ranges, see `reconciliation`."""

    level: int
    hashes: tuple[tuple[int, int], ...]
    """(range, hash of all stamps in it)."""


@dataclass(frozen=True, slots=True)
class Want:
    """Send me your records of these key ranges; here are my stamps there, so send only what is newer."""

    ranges: tuple[int, ...]
    have: tuple[tuple[str, Stamp], ...] = ()


@dataclass(frozen=True, slots=True)
class News:
    """Nothing but what rides along."""


Body = Ping | PingRequest | Ack | Nack | Compare | Want | News


@dataclass(frozen=True, slots=True)
class Envelope:
    """One packet. `root` is the hash of the sender's whole replicated map: equal roots need no comparison; `gone` likewise."""

    sender: NodeId
    incarnation: int
    body: Body
    root: int = 0
    updates: tuple[Update, ...] = ()
    records: tuple[Record, ...] = ()
    gone: int = 0
    """64 bits over the members that the sender holds for dead or gone; who holds others so tells it whom."""
