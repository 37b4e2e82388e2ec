"""What a coordinator sees and what it says: the values of `coordination`, and one view sorted for looking things up.

Law of this file: pure values; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from tars.core.placement import ORDERS, still_asked_for
from tars.core.placement_cost import Measured
from tars.core.placement_wants import resolve
from tars.core.plannable_models import Plannable, plannable
from tars.core.records import NodeAdvert, Orders, ReplicaReport, Wish
from tars.core.types import (
    Assignment,
    Bytes,
    Deployment,
    DeviceId,
    DeviceSnapshot,
    ModelEntry,
    NodeId,
    NodeSnapshot,
    Plan,
    ReplicaId,
    ReplicaState,
)

RUNNING = (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.READY, ReplicaState.RESTARTING)
"""What holds, or soon holds, its memory."""
MOVING = (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING, ReplicaState.STOPPING)
"""A device's memory is in motion while one of its replicas is in these."""
FETCH = "fetch"
"""The stage of a replica whose file is still being copied: its device is quiet meanwhile."""


@dataclass(frozen=True, slots=True)
class CoordinationSettings:
    """Times in seconds; each with its reason."""

    move_hold: float = 60.0
    """A refusal lasts so long before healthy replicas make room for it: a PC that is switched on in that time costs no move."""
    crowd_hold: float = 10.0
    """A device is over its capacity so long before a replica leaves it: a program that starts and ends again moves no 4 GB."""
    spread_hold: float = 10.0
    """Two replicas of a model are on one node, and another one has room, for so long before one moves: what comes back has settled."""
    spread_again: float = 3600.0
    """Where a load failed so lately, nothing is moved to bring two replicas apart, whose model is answered as it is: by and by memory
    is free there."""
    order_patience: float = 30.0
    """What was ordered and not reported since is planned anew: the order reached the node in a second, unless it died."""
    bar_first: float = 60.0
    bar_most: float = 3600.0
    """A device where a load failed is not tried again for `bar_first`, doubling to `bar_most` (seconds)."""
    drain_patience: float = 120.0
    """A node that drains waits so long for its replicas to be ready elsewhere: somebody wants the memory, and a copy may take an hour."""
    crowd_free: Bytes = Bytes.mib(256)
    crowd_growth: Bytes = Bytes.mib(512)
    """A device is crowded where programs beside TARS took at least `crowd_growth` since its replicas were loaded and left less than
    `crowd_free`: they want more. A desktop's windows come and go within it."""
    orders: int = ORDERS
    """Of replicas that the planner tries, see `placement.plan`."""
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
    """In force, whoever gave them: the last decision's, once they are written."""
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


def same_load(one: Assignment, other: Assignment) -> bool:
    """Whether both mean the same worker: what differs in words or estimates loads nothing anew."""
    return (one.replica, one.variant, one.device, one.settings) == (
        other.replica,
        other.variant,
        other.device,
        other.settings,
    )


class Scene:
    """One view, sorted for looking things up."""

    def __init__(self, view: CoordinationView):
        self.view = view
        self.now = view.now
        self.adverts = tuple(sorted(view.adverts, key=lambda advert: advert.node.id))
        self.nodes: list[NodeSnapshot] = [advert.node for advert in self.adverts]
        self.home = {node.id: node for node in self.nodes}
        self.devices: dict[DeviceId, DeviceSnapshot] = {d.id: d for node in self.nodes for d in node.devices}
        self.reports: dict[ReplicaId, ReplicaReport] = {}
        for advert in self.adverts:
            for report in advert.replicas:
                # A node speaks for its own devices only.
                if report.assignment.node == advert.node.id and report.assignment.device in self.devices:
                    self.reports[report.assignment.replica] = report
        self.files: Plannable = plannable(view.models, self.adverts, view.wishes, hub=view.hub)
        wanted = [wish.deployment for wish in view.wishes]
        by_model, _ = resolve(wanted, self.files.models)
        self.deployments = [each for each in wanted if not self._without_file(each)]
        self.wanted: dict[str, tuple[Deployment, ModelEntry]] = {e.name: (d, e) for d, e in by_model}
        self.ordered = {
            assignment.replica: assignment
            for node in self.nodes
            for assignment in self._orders(node.id)
            if assignment.node == node.id and assignment.device in self.devices
        }

    def _orders(self, node: NodeId) -> tuple[Assignment, ...]:
        orders = self.view.orders.get(node)
        return () if orders is None else orders.assignments

    def _without_file(self, deployment: Deployment) -> bool:
        name = deployment.model.casefold()
        return any(
            name in (each.name.casefold(), *map(str.casefold, each.aliases))
            for each in self.files.without_file.values()
        )

    def state(self, assignment: Assignment) -> ReplicaState | None:
        """Of this very load, as its node reports it."""
        report = self.reports.get(assignment.replica)
        return report.state if report is not None and same_load(report.assignment, assignment) else None

    def asked_for(self, assignment: Assignment) -> bool:
        """Whether it is as its deployment wants it, wherever it is."""
        return self._current(assignment) is not None

    def updated(self, assignment: Assignment) -> Assignment:
        """With the bytes that are known by now."""
        return self._current(assignment) or assignment

    def _current(self, assignment: Assignment) -> Assignment | None:
        if assignment.model not in self.wanted:
            return None
        deployment, entry = self.wanted[assignment.model]
        device = self.devices[assignment.device]
        return still_asked_for(assignment, deployment, entry, device, self.view.measured)

    def place(self, device: DeviceId) -> str:
        """`RTX 3060 of pc1`."""
        found = self.devices.get(device)
        return device if found is None else f"{found.name} of {self.home[found.node].name}"

    def in_motion(self) -> set[DeviceId]:
        """Devices whose memory changes: something loads or ends there."""
        return {
            report.assignment.device
            for report in self.reports.values()
            if report.state in MOVING and report.stage != FETCH
        }
