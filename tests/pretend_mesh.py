"""Nodes that carry out their orders in steps, on time that the test turns: for the coordinator's decisions, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fleets import MODELS

from tars.core.coordination import Coordination, CoordinationSettings, CoordinationView, Decision, same_load
from tars.core.records import HeldFile, NodeAdvert, Orders, ReplicaReport, Wish
from tars.core.types import Assignment, Bytes, Deployment, DeviceId, NodeId, NodeSnapshot, ReplicaId, ReplicaState


@dataclass
class Pc:
    """A PC: what it has, what runs on it, what other programs hold there."""

    snapshot: NodeSnapshot
    """Its devices with nothing on them."""
    alive: bool = True
    draining: bool = False
    replicas: dict[ReplicaId, ReplicaReport] = field(default_factory=dict)
    foreign: dict[DeviceId, int] = field(default_factory=dict)
    files: tuple[HeldFile, ...] = ()

    def held(self, device: DeviceId) -> int:
        return sum(
            each.assignment.memory.total
            for each in self.replicas.values()
            if each.assignment.device == device and each.state is not ReplicaState.FAILED
        )

    def advert(self) -> NodeAdvert:
        devices = tuple(
            replace(
                device,
                memory_held=Bytes(self.held(device.id)),
                memory_free=Bytes(max(0, device.memory_free - self.held(device.id) - self.foreign.get(device.id, 0))),
            )
            for device in self.snapshot.devices
        )
        node = replace(self.snapshot, devices=devices, draining=self.draining)
        return NodeAdvert(node, replicas=tuple(self.replicas.values()), files=self.files)


class PretendMesh:
    """Some PCs, one coordinator that every test may replace, and a clock."""

    def __init__(
        self,
        nodes: Sequence[NodeSnapshot],
        wanted: Sequence[Deployment] = (),
        settings: CoordinationSettings | None = None,
        *,
        everywhere: bool = True,
    ):
        self.pcs = {each.id: Pc(each) for each in nodes}
        self.wanted = list(wanted)
        self.models = {
            name: replace(
                entry, variants=tuple(replace(each, repo="somebody/models", file=each.name) for each in entry.variants)
            )
            for name, entry in MODELS.items()
        }
        self.everywhere = everywhere
        """Every node can fetch every file."""
        self.coordination = Coordination(settings)
        self.orders: dict[NodeId, Orders] = {}
        self.now = 0.0
        self.fails: set[tuple[str, DeviceId]] = set()
        self.versions: dict[str, int] = {}
        self.unloaded: list[ReplicaId] = []
        self.decision: Decision | None = None

    def view(self) -> CoordinationView:
        return CoordinationView(
            adverts=tuple(pc.advert() for pc in self.pcs.values() if pc.alive),
            wishes=tuple(Wish(each) for each in self.wanted),
            now=self.now,
            orders=dict(self.orders),
            models=self.models,
            hub=self.everywhere,
            versions=dict(self.versions),
        )

    def decide(self) -> Decision:
        """One decision; its orders are in force from now on."""
        self.decision = self.coordination.decide(self.view())
        for node, assignments in self.decision.orders.items():
            self.orders[node] = Orders(node, NodeId("coordinator"), assignments)
        self.check(self.decision)
        return self.decision

    def obey(self) -> bool:
        """Every live PC unloads what it should not have, and begins to load what it should; whether anything changed."""
        changed = False
        for node, pc in self.pcs.items():
            if not pc.alive or node not in self.orders:
                continue
            ordered = {each.replica: each for each in self.orders[node].assignments}
            for replica, report in list(pc.replicas.items()):
                if replica not in ordered or not same_load(ordered[replica], report.assignment):
                    del pc.replicas[replica]
                    self.unloaded.append(replica)
                    changed = True
            for replica, assignment in ordered.items():
                if replica not in pc.replicas:
                    loading = ReplicaReport(assignment, self.models[assignment.model].kind, ReplicaState.LOADING)
                    pc.replicas[replica] = loading
                    changed = True
        return changed

    def finish(self) -> bool:
        """What loads is loaded, or fails; whether anything did."""
        changed = False
        for pc in self.pcs.values():
            for replica, report in pc.replicas.items():
                if pc.alive and report.state is ReplicaState.LOADING:
                    failed = (report.assignment.model, report.assignment.device) in self.fails
                    state, error = (ReplicaState.FAILED, "it is broken") if failed else (ReplicaState.READY, None)
                    pc.replicas[replica] = replace(report, state=state, error=error)
                    changed = True
        return changed

    def settle(self, most: int = 60) -> int:
        """Decide and obey until nothing changes any more; how many decisions that took. Time stands still."""
        for count in range(1, most + 1):
            before = dict(self.orders)
            self.decide()
            if not (self.obey() | self.finish()) and before == self.orders:
                return count
        raise AssertionError(f"still moving after {most} decisions")

    def wait(self, seconds: float) -> None:
        """Let time pass, deciding whenever the coordinator asked for it, and settle at the end."""
        ends = self.now + seconds
        while self.decision is not None and (due := self.decision.wake_at) is not None and due <= ends:
            self.now = due
            self.settle()
        self.now = ends
        self.settle()

    def die(self, node: str) -> None:
        pc = self.pcs[NodeId(node)]
        pc.alive = False
        pc.replicas.clear()

    # --- what the tests look at ---------------------------------------------------------------------------------------

    def ready(self) -> dict[str, list[str]]:
        """By model: the devices of its ready replicas."""
        found: dict[str, list[str]] = {}
        for pc in self.pcs.values():
            for report in pc.replicas.values():
                if report.state is ReplicaState.READY:
                    found.setdefault(report.assignment.model, []).append(report.assignment.device)
        return {model: sorted(devices) for model, devices in sorted(found.items())}

    def run(self, model: str, device: str, state: ReplicaState = ReplicaState.READY, number: int = 0) -> Assignment:
        """Put a replica somewhere as if it had been ordered by somebody else."""
        alone = PretendMesh([each.snapshot for each in self.pcs.values()], [])
        alone.wanted = [replace(next(d for d in self.wanted if d.model == model), replicas=1, device=device)]
        alone.settle()
        (assignment,) = alone.decision.plan.assignments
        assignment = replace(assignment, replica=ReplicaId(f"{assignment.replica[:-1]}{number}"))
        report = ReplicaReport(assignment, self.models[model].kind, state)
        self.pcs[assignment.node].replicas[assignment.replica] = report
        return assignment

    def check(self, decision: Decision) -> None:
        """What holds of every decision: orders only for live nodes and their own devices, one new load a device, none in hope."""
        assert set(decision.orders) == {node for node, pc in self.pcs.items() if pc.alive}
        for node, assignments in decision.orders.items():
            pc = self.pcs[node]
            replicas = [each.replica for each in assignments]
            assert replicas == sorted(set(replicas))
            assert all(each.node == node for each in assignments)
            devices = {device.id: device for device in pc.advert().node.devices}
            for device in devices.values():
                here = [each for each in assignments if each.device == device.id]
                new = [each for each in here if each.replica not in pc.replicas]
                assert len(new) <= 1, f"{len(new)} loads at once on {device.id}"
                if new:
                    promised = sum(each.memory.total for each in here)
                    assert promised <= device.capacity, f"{device.id} is over-committed"
        assert decision.wake_at is None or decision.wake_at > self.now
