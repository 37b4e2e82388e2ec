"""What happens to a node of the mesh, what it then wants done, and how it sees the others: the words between `mesh_machine` and its driver.

Law of this file: frozen values only. `mesh.gossip` and the simulation both speak exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tars.core.mesh_messages import Envelope, MemberState, Record
from tars.core.types import NodeId

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """It is `next_due`, or later. Too many ticks do no harm."""


@dataclass(frozen=True, slots=True)
class Received:
    """An envelope came; whoever received it knows that it is from `envelope.sender`."""

    envelope: Envelope


@dataclass(frozen=True, slots=True)
class NotSent:
    """An envelope could not be given to `to` (refused, or no answer in time on every address). `number` is its body's, if it has one."""

    to: NodeId | None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Something else came from `node`, an answer to a call for example: it lives."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Stalled:
    """This node's own loop stood still for `seconds` up to now: what it missed meanwhile says nothing about its peers.

    The machine sees by itself when a tick comes late; this is for what the driver alone can know. Told twice it counts once.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class Leave:
    """This node goes, and tells the others."""


@dataclass(frozen=True, slots=True)
class Drain:
    """This node takes no new work (True), or takes it again (False)."""

    on: bool


@dataclass(frozen=True, slots=True)
class Seed:
    """Somebody may be at `address` (`host:port`): asked now, and again now and then until a member is known to be there."""

    address: str


@dataclass(frozen=True, slots=True)
class Readdressed:
    """This node is reachable at these addresses from now on, best first."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """This node's own queues, for its answers to probes: (replica, active calls, queued calls)."""

    load: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """These records were written into this node's map, by itself or by whoever let it join: they are told to the others."""

    records: tuple[Record, ...]


Event = Tick | Received | NotSent | Traffic | Stalled | Leave | Drain | Seed | Readdressed | Loaded | Changed


# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Give `envelope` to `to` at the first of `addresses` that takes it; `to` None: to whoever is there."""

    to: NodeId | None
    addresses: tuple[str, ...]
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A peer is seen in another state. `before` None: it was no member; `after` None: it is none any more."""

    node: NodeId
    before: MemberState | None
    after: MemberState | None


@dataclass(frozen=True, slots=True)
class RecordsChanged:
    """The values under `keys` are new. Records that this node wrote itself are named too, once `Changed` told of them."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CoordinatorChanged:
    """`node` coordinates now; None: nobody that this node knows (it has left)."""

    node: NodeId | None


@dataclass(frozen=True, slots=True)
class LoadHeard:
    """A peer's queues, as it told them in an answer: (replica, active calls, queued calls)."""

    node: NodeId
    load: tuple[tuple[str, int, int], ...]


Effect = Send | MemberChanged | RecordsChanged | CoordinatorChanged | LoadHeard


# --- the view -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberView:
    """A peer as this node sees it. `since` is when it came into this state, on the clock of `handle`'s `now`."""

    node: NodeId
    state: MemberState
    incarnation: int
    """-1: never heard of since this node started; it is presumed alive until it fails to answer."""
    addresses: tuple[str, ...]
    """What it says of itself first, then what its record says, then where a seed found it."""
    since: float


@dataclass(frozen=True, slots=True)
class MeshView:
    """Every peer (not this node itself), who coordinates, and whether this node takes itself for cut off."""

    members: Mapping[NodeId, MemberView] = field(default_factory=dict)
    coordinator: NodeId | None = None
    isolated: bool = False
