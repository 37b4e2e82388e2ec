"""What every node should hold now: from what the live nodes say of themselves and what is wanted, to a plan and each node's orders.

Law of this file: pure. `Coordination` remembers between two decisions only what cannot be read from the nodes' words (since when something
is so), so another node can take over at any moment: it forgets holds and bars, and moves nothing because of that.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from tars.core.placement_cost import Measured
from tars.core.records import NodeAdvert, Orders, Wish
from tars.core.types import Assignment, DeviceId, ModelEntry, NodeId, Plan, ReplicaId


@dataclass(frozen=True, slots=True)
class CoordinationSettings:
    """Times in seconds; each with its reason."""

    move_hold: float = 60.0
    """A refusal lasts so long before healthy replicas make room for it: a PC that is switched on in that time costs no move."""
    crowd_hold: float = 10.0
    """A device is over its capacity so long before a replica leaves it: a program that starts and ends again moves no 4 GB."""
    order_patience: float = 30.0
    """What was ordered and not reported since is planned anew: the order reached the node in a second, unless it died."""
    bar_first: float = 60.0
    bar_most: float = 3600.0
    """A device where a load failed is not tried again for `bar_first`, doubling to `bar_most` (seconds)."""
    move_margin: float = 2.0
    """Making room reloads at most so many times the bytes that it places: a 40 GB reload for a 100 MB model never pays."""


@dataclass(frozen=True, slots=True)
class CoordinationView:
    """All that a decision is made from.

    An advert's devices are for planning: while something loads or ends on a device, its node gives it as it was before that began
    (or counts what the load took already as held), see `placement.plan`. A replica that is ending is reported as STOPPING until its
    memory is free.
    """

    adverts: tuple[NodeAdvert, ...]
    """Of the nodes that are alive (ALIVE, SUSPECT, DRAINING), this one too; `advert.node.draining` says which give their devices back."""
    wishes: tuple[Wish, ...]
    now: float
    """Monotonic seconds of whoever decides."""
    orders: Mapping[NodeId, Orders] = field(default_factory=dict)
    """In force, whoever gave them."""
    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    """The catalogue that comes with TARS. Entries of adverts and wishes go before it."""
    measured: Measured = field(default_factory=dict)
    """By kind of card, see `placement_cost.measured_by_key`."""
    hub: bool = False
    """Whether a node can fetch a variant with `repo` and `file` that no node has."""
    versions: Mapping[str, Hashable] = field(default_factory=dict)
    """By model: anything that changes each time when somebody deploys it, even unchanged; loads that failed are then tried again."""


@dataclass(frozen=True, slots=True)
class Move:
    """A healthy replica that goes elsewhere: loaded there first, then unloaded here. In `Decision.moves` from its order to its end."""

    replica: ReplicaId
    model: str
    source: DeviceId
    target: DeviceId
    successor: ReplicaId
    """The replica at the target."""
    gain: str
    """What the move is good for, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. `orders` has every live node; a record is written only where it differs from what is in force."""

    plan: Plan
    orders: Mapping[NodeId, tuple[Assignment, ...]]
    wake_at: float | None = None
    """When time alone may change the decision; None: never."""
    moves: tuple[Move, ...] = ()


class Coordination:
    """See the module's law. One for each node; asked only while that node coordinates, or for a preview of what it would do."""

    def __init__(self, settings: CoordinationSettings | None = None):
        self._settings = CoordinationSettings() if settings is None else settings

    def decide(self, view: CoordinationView) -> Decision:
        """The plan and the orders that come nearest to it now: at most one load a device at a time, in hope never."""
        raise NotImplementedError
