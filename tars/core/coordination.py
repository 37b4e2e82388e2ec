"""What every node should hold now: from what the live nodes say of themselves and what is wanted, to a plan and each node's orders.

Law of this file: pure. `Coordination` remembers between two decisions only what cannot be read from the nodes' words (since when something
is so), so another node can take over at any moment: it forgets holds and bars, and moves nothing because of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from tars.core.coordination_orders import orders_for
from tars.core.coordination_view import (
    RUNNING,
    CoordinationSettings,
    CoordinationView,
    Decision,
    Move,
    Scene,
    same_load,
)
from tars.core.load_bars import LoadBars
from tars.core.making_room import Ground, Room
from tars.core.placement import fits, plan, replica_id
from tars.core.placement_wants import Circumstances
from tars.core.reasons_to_move import ReasonsToMove
from tars.core.types import (
    Assignment,
    DeviceId,
    NodeId,
    Plan,
    Refusal,
    ReplicaId,
    ReplicaState,
)

__all__ = ["Coordination", "CoordinationSettings", "CoordinationView", "Decision", "Move", "same_load"]

AGE = 1000.0
"""Seconds; only the order of ages counts: an age becomes a part of one."""
LOADS = 0.5
"""The worth of a replica that loads: less than a ready one's, more than that of one which was ordered and is not reported."""


@dataclass(slots=True)
class _Pending:
    """A move that is under way: `source` goes once `successor` is ready."""

    source: Assignment
    successor: Assignment
    gain: str
    began: float


class Coordination:
    """See the module's law. One for each node; asked only while that node coordinates."""

    def __init__(self, settings: CoordinationSettings | None = None):
        self._settings = CoordinationSettings() if settings is None else settings
        self._bars = LoadBars(self._settings.bar_first, self._settings.bar_most)
        self._versions: dict[str, Hashable] = {}
        self._again: set[ReplicaId] = set()
        """FAILED, and wanted again: taken from the orders until they are gone, and then ordered anew."""
        self._ready_since: dict[ReplicaId, tuple[NodeId, float]] = {}
        """Of a node that is away, too: behind a broken cable its replica may have gone on."""
        self._ordered_since: dict[ReplicaId, float] = {}
        self._leaving_since: dict[ReplicaId, float] = {}
        self._over_since: dict[DeviceId, float] = {}
        self._reasons = ReasonsToMove(self._settings)
        self._pending: _Pending | None = None
        self._last: tuple[CoordinationView, Decision] | None = None

    def decide(self, view: CoordinationView) -> Decision:
        """The plan and the orders that come nearest to it now: at most one load a device at a time, in hope never."""
        if (known := self._last) is not None and _nothing_new(*known, view):
            return known[1]
        self._last = (view, decision := self._decided(Scene(view)))
        return decision

    def _decided(self, scene: Scene) -> Decision:
        self._remember(scene)
        self._follow_move(scene)
        found, circumstances = self._plan(scene)
        if self._pending is None and self._begin_move(scene, found, circumstances):
            found, circumstances = self._plan(scene)
        moves = self._leaving(scene, found)
        orders = orders_for(scene, found, moves, self._again)
        refusals = (*found.refusals, *_without_file(scene))
        found = replace(found, refusals=tuple(sorted(refusals, key=lambda refusal: refusal.model)))
        return Decision(found, orders, self._wake_at(scene), moves)

    def preview(self, view: CoordinationView) -> Plan:
        """The plan as it would be; remembers nothing, so any node may ask for any view."""
        scene = Scene(view)
        current = [
            *(report.assignment for report in scene.reports.values() if report.state in RUNNING),
            *(each for each in scene.ordered.values() if scene.state(each) is None),
        ]
        circumstances = Circumstances(
            bars=self._bars.in_force(scene.now),
            holders=scene.files.holders,
            forgiven=[each.replica for each in current if scene.state(each) is ReplicaState.READY],
            worth={each.replica: self._worth(each, scene) for each in current},
        )
        return self._planned(scene, current, circumstances)

    def room_for(self, view: CoordinationView, model: str) -> Room | None:
        """How healthy replicas would make room for a model that `preview` refuses; None where that is not possible or does not pay."""
        scene, found = Scene(view), self.preview(view)
        if model not in scene.wanted:
            return None
        movable = {each.replica: each for each in found.assignments if scene.state(each) is ReplicaState.READY}
        circumstances = Circumstances(bars=self._bars.in_force(scene.now), holders=scene.files.holders)
        ground = Ground(scene.nodes, found.assignments, scene.wanted, view.measured, circumstances)
        return ground.for_model(model, movable, self._settings.move_margin)

    def forget(self, model: str) -> None:
        """Somebody deploys the model again: loads of it that failed are tried again at once."""
        self._bars.forget(model)
        self._last = None

    # --- what is remembered ------------------------------------------------------------------------------------------

    def _remember(self, scene: Scene) -> None:
        now, reports = scene.now, scene.reports
        self._bars.note(scene.adverts, now)
        failed = {replica for replica, report in reports.items() if report.state is ReplicaState.FAILED}
        for model, version in scene.view.versions.items():
            if model in self._versions and self._versions[model] != version:
                self._bars.forget(model)
                self._again |= {replica for replica in failed if reports[replica].assignment.model == model}
            self._versions[model] = version
        self._again &= failed
        ready = {replica for replica, report in reports.items() if report.state is ReplicaState.READY}
        away = {
            each: since
            for each, since in self._ready_since.items()
            if each not in reports and since[0] not in scene.home
        }
        for each in sorted(ready):
            node = reports[each].assignment.node
            away[each] = (node, self._ready_since.get(each, (node, now))[1])
        self._ready_since = away
        unreported = {each.replica for each in scene.ordered.values() if scene.state(each) is None}
        self._ordered_since = {each: self._ordered_since.get(each, now) for each in sorted(unreported)}
        self._reasons.note(scene)

    def _follow_move(self, scene: Scene) -> None:
        """End the pending move where its successor is ready and its source gone, or where it can no longer be."""
        if (pending := self._pending) is None:
            return
        source, successor = pending.source, pending.successor
        there = scene.state(successor)
        unordered = there is None and successor.replica not in scene.ordered and scene.now > pending.began
        late = there is None and _lasted(pending.began, self._settings.order_patience, scene.now)
        gone = scene.state(source) not in RUNNING
        lost = successor.device not in scene.devices or scene.home[successor.node].draining
        if gone or there is ReplicaState.FAILED or late or unordered or lost or not scene.asked_for(source):
            self._pending = None

    # --- the plan ----------------------------------------------------------------------------------------------------

    def _plan(self, scene: Scene) -> tuple[Plan, Circumstances]:
        """Sticky: what runs or was ordered stays; a device that is over its capacity is forgiven for a while."""
        current = self._current(scene)
        forgiven = {
            each.replica: each.device
            for each in current
            if scene.state(each) in (ReplicaState.READY, ReplicaState.RESTARTING)
        }
        circumstances = Circumstances(
            bars=self._bars.in_force(scene.now),
            holders=scene.files.holders,
            forgiven={replica for replica, device in forgiven.items() if not self._over_long(device, scene.now)},
            worth={each.replica: self._worth(each, scene) for each in current},
        )
        found = self._planned(scene, current, circumstances)
        over = _over_committed(scene, [each for each in current if each.replica in forgiven])
        self._over_since = {device: self._over_since.get(device, scene.now) for device in sorted(over)}
        failed = self._failed_in_place(scene, found)
        if failed:
            # Nothing else takes them: they stay where they failed, and their node tries again after a cool-down.
            found = self._planned(scene, [*current, *failed], circumstances)
        return found, circumstances

    def _planned(self, scene: Scene, current: Sequence[Assignment], circumstances: Circumstances) -> Plan:
        return plan(
            scene.nodes,
            scene.files.models,
            scene.deployments,
            current,
            scene.view.measured,
            circumstances=circumstances,
            orders=self._settings.orders,
        )

    def _current(self, scene: Scene) -> list[Assignment]:
        """What runs, then what was ordered lately and is not reported yet; a replica that moves counts where it goes."""
        runs = [report.assignment for report in scene.reports.values() if report.state in RUNNING]
        motion = scene.in_motion()
        coming = [
            assignment
            for assignment in scene.ordered.values()
            if scene.state(assignment) is None
            and (
                not _lasted(self._ordered_since[assignment.replica], self._settings.order_patience, scene.now)
                or assignment.device in motion
            )
        ]
        current = [*runs, *coming]
        if self._pending is not None:
            moved, successor = self._pending.source.replica, self._pending.successor
            current = [each for each in current if each.replica not in (moved, successor.replica)]
            current.append(successor)
        return current

    def _worth(self, assignment: Assignment, scene: Scene) -> float:
        """READY ones before others, of them the longest held; one that loads before one that was only ordered."""
        state = scene.state(assignment)
        if state is not ReplicaState.READY:
            return 0.0 if state is None else LOADS
        known = self._ready_since.get(assignment.replica)
        age = 0.0 if known is None else scene.now - known[1]
        return 1.0 + age / (age + AGE)

    def _over_long(self, device: DeviceId, now: float) -> bool:
        since = self._over_since.get(device)
        return since is not None and _lasted(since, self._settings.crowd_hold, now)

    def _failed_in_place(self, scene: Scene, found: Plan) -> list[Assignment]:
        """Those that may be tried again where they failed: as long as they fit there, for nothing is loaded in hope."""
        missing = {refusal.model for refusal in found.refusals}
        taken = Counter[DeviceId]()
        for each in found.assignments:
            taken[each.device] += each.memory.total
        stay: list[Assignment] = []
        for replica, report in scene.reports.items():
            assignment = report.assignment
            if (
                report.state is ReplicaState.FAILED
                and assignment.model in missing
                and replica not in self._again
                and not scene.home[assignment.node].draining
                and scene.asked_for(assignment)
                and taken[assignment.device] + assignment.memory.total <= scene.devices[assignment.device].capacity
            ):
                taken[assignment.device] += assignment.memory.total
                stay.append(assignment)
        return stay

    def _begin_move(self, scene: Scene, found: Plan, circumstances: Circumstances) -> bool:
        """The one that is due; whether one began."""
        lately = self._bars.failed_within(self._settings.spread_again, scene.now)
        due = self._reasons.due(scene, found, circumstances, lately, lambda each: self._worth(each, scene))
        if due is None:
            return False
        source, device = due.home.assignment, due.home.device
        taken = {each.replica for each in found.assignments} | scene.reports.keys() | scene.ordered.keys()
        successor = replace(
            source,
            replica=replica_id(source.model, due.home.node.id, device.id, taken),
            node=due.home.node.id,
            device=device.id,
            memory=due.home.cost.memory,
            settings=due.home.cost.settings,
            reason=f"moved here from {scene.place(source.device)}: {due.gain}",
        )
        self._pending = _Pending(source, successor, due.gain, scene.now)
        return True

    # --- what leaves -------------------------------------------------------------------------------------------------

    def _leaving(self, scene: Scene, found: Plan) -> tuple[Move, ...]:
        """Healthy replicas that are planned elsewhere and stay until as many are ready there: nobody is without an answer meanwhile."""
        planned = {each.replica for each in found.assignments}
        arriving: dict[str, list[Assignment]] = {}
        for each in found.assignments:
            if scene.state(each) not in (ReplicaState.READY, ReplicaState.FAILED):
                arriving.setdefault(each.model, []).append(each)
        leaving = [
            report.assignment
            for replica, report in scene.reports.items()
            if replica not in planned and report.state is ReplicaState.READY and scene.asked_for(report.assignment)
        ]
        moves: list[Move] = []
        since: dict[ReplicaId, float] = {}
        for each in sorted(leaving, key=lambda each: (-self._worth(each, scene), each.replica)):
            successors = arriving.get(each.model)
            since[each.replica] = self._leaving_since.get(each.replica, scene.now)
            late = _lasted(since[each.replica], self._settings.drain_patience, scene.now)
            if not successors or late:
                continue
            successor = successors.pop(0)
            moves.append(
                Move(
                    replica=each.replica,
                    model=each.model,
                    source=each.device,
                    target=successor.device,
                    successor=successor.replica,
                    gain=self._why_leaving(each, scene),
                )
            )
        self._leaving_since = since
        return tuple(sorted(moves, key=lambda move: move.replica))

    def _why_leaving(self, assignment: Assignment, scene: Scene) -> str:
        if self._pending is not None and self._pending.source.replica == assignment.replica:
            return self._pending.gain
        node = scene.home[assignment.node]
        if node.draining:
            return f"{node.name} is draining and gets its memory back"
        return f"{scene.place(assignment.device)} has less memory left for TARS than it holds"

    def _wake_at(self, scene: Scene) -> float | None:
        """The next end of a hold, a bar or a patience."""
        settings, now = self._settings, scene.now
        ends = list(self._reasons.ends())
        for since, hold in (
            *((since, settings.crowd_hold) for since in self._over_since.values()),
            *((since, settings.order_patience) for since in self._ordered_since.values()),
            *((since, settings.drain_patience) for since in self._leaving_since.values()),
        ):
            ends.append(since + hold)
        if self._pending is not None:
            ends.append(self._pending.began + settings.order_patience)
        for bar in (self._bars.next_end(now), self._bars.next_forgiven(settings.spread_again, now)):
            if bar is not None:
                ends.append(bar)
        return min((end for end in ends if end > now), default=None)


def _nothing_new(before: CoordinationView, decision: Decision, view: CoordinationView) -> bool:
    """Whether the same would be decided again: nobody says anything else, and no hold or patience has ended since."""
    if decision.wake_at is not None and view.now >= decision.wake_at:
        return False
    return replace(before, now=0.0) == replace(view, now=0.0)


def _lasted(since: float, hold: float, now: float) -> bool:
    """In the same arithmetic as `wake_at`, so that whoever wakes then finds it so."""
    return now >= since + hold


def _over_committed(scene: Scene, running: Iterable[Assignment]) -> list[DeviceId]:
    """Devices that cannot hold what runs there, whether it is to stay or not: one that leaves is not forgiven again meanwhile."""
    promised: Counter[DeviceId] = Counter()
    for each in running:
        promised[each.device] += scene.updated(each).memory.total
    return [device for device, total in promised.items() if not fits(total, scene.devices[device])]


def _without_file(scene: Scene) -> list[Refusal]:
    wanted: Counter[str] = Counter()
    for wish in scene.view.wishes:
        for entry in scene.files.without_file.values():
            if wish.deployment.model in (entry.name, *entry.aliases):
                wanted[entry.name] = max(wanted[entry.name], wish.deployment.replicas)
    return [
        Refusal(model, replicas, (), f"No node has a file of {model}. `tars pull {model}` fetches it.")
        for model, replicas in sorted(wanted.items())
    ]
