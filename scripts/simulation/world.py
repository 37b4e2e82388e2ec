"""The whole simulation of one seed: PCs, network, operators and time; and the verdict.

Law of this file: everything follows from the seed. It wires what `scenario` wants to happen to the nodes, hands what happened to
`invariants`, and keeps the history. Same seed, same history, byte for byte.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from breach import Breach
from invariants import OperatorsWrites, check_decision, why_not_settled
from virtual_callers import Callers, Tally
from virtual_executor import Conditions
from virtual_fleet import Pc, models, pc, really_taken
from virtual_network import VirtualNetwork
from virtual_node import VirtualNode
from virtual_time import VirtualTime
from virtual_wire import Wire

from tars.core.coordination_view import CoordinationSettings, CoordinationView, Decision
from tars.core.membership import MembershipSettings
from tars.core.mesh_machine import MeshSettings
from tars.core.mesh_messages import Envelope, MemberState, Record
from tars.core.placement_cost import card_of
from tars.core.replicated_map import DEPLOYMENT, orders_for, prefix_of
from tars.core.types import Assignment, Bytes, DeviceId, DeviceSnapshot, NodeId

QUICK = CoordinationSettings(
    move_hold=6.0,
    crowd_hold=2.0,
    spread_hold=1.0,
    order_patience=5.0,
    bar_first=4.0,
    bar_most=16.0,
    drain_patience=10.0,
    orders=8,
)
"""The coordinator's patience, a tenth of the real one: so less virtual time shows as much."""
PATIENCE_SECONDS = QUICK.move_hold + 2.0
"""After so long a quiet the coordinator has done what it waited with."""
SETTLE_SECONDS = 60.0
"""So long after the last fault everything must be settled at the latest."""
CALM_SECONDS = 12.0
"""A node that nothing was done to for so long, on a network that is well, must not be taken for dead."""


@dataclass(slots=True)
class Outcome:
    """What became of one seed. `failure` is None where everything held."""

    seed: int
    failure: str | None = None
    nodes: int = 0
    virtual_seconds: float = 0.0
    steps: int = 0
    packets: int = 0
    settled_after: float = 0.0
    """Seconds from the last fault until everything was settled."""
    decisions: int = 0
    loads: int = 0
    faults: list[str] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    calls: Tally = field(default_factory=Tally)


class World:
    """See the module's law. `trace` keeps the history, `packets` in it every envelope too."""

    def __init__(self, seed: int, *, trace: bool = False, packets: bool = False):
        self.seed = seed
        self.time = VirtualTime()
        self.dice = random.Random(f"{seed}/world")
        self.network = VirtualNetwork(self.time, random.Random(f"{seed}/network"))
        self.wire = Wire(self.time, self.network, random.Random(f"{seed}/wire"))
        self.callers = Callers(self)
        self.models = models()
        self.probe_seconds = self.dice.choice((0.5, 1.0, 1.0, 1.0))
        """Slower than the default saves half of what a seed costs."""
        self.coordination_settings = QUICK
        self.wall_ms = 1_750_000_000_000
        self.nodes: list[VirtualNode] = []
        self.ever: set[NodeId] = set()
        """Every node that was ever admitted."""
        self.foreign: dict[str, dict[DeviceId, int]] = {}
        """By PC's name: what foreign programs want of its devices."""
        self.fails = 0.0
        """This share of loads fails just now."""
        self.writes = OperatorsWrites()
        self.faults: list[str] = []
        self.history: list[str] = []
        self.tracing = packets
        self._trace = trace
        self._names: dict[NodeId, str] = {}
        self._addresses: dict[NodeId, str] = {}
        self._touched: dict[str, float] = {}
        self._weather_until = 0.0
        self.conditions = Conditions(
            load_seconds=lambda assignment: 0.3 + assignment.memory.total / 8e9 + self.dice.random(),
            stop_seconds=lambda: 0.05 + 0.5 * self.dice.random(),
            fails=self._why_load_fails,
            takes=self._takes,
            kind=lambda model: self.models[model].kind,
        )

    # --- PCs ----------------------------------------------------------------------------------------------------------

    def new_node(self) -> VirtualNode:
        """A PC is bought; it does not run yet."""
        bought = pc(self.dice, len(self.nodes))
        node = VirtualNode(bought, self)
        self.nodes.append(node)
        self.register(bought)
        return node

    def new_node_with_card(self) -> VirtualNode:
        """The next one that has a card: a CPU alone may be too small. The others are given back before they ran."""
        while True:
            node = self.new_node()
            if any(device.compute_capability for device in node.pc.devices):
                return node
            self.nodes.remove(node)
            self.ever.discard(node.id)

    def register(self, bought: Pc) -> None:
        self._names[bought.node] = bought.name
        self._addresses[bought.node] = bought.address
        self.ever.add(bought.node)

    def name_of(self, node: NodeId | None) -> str:
        return "nobody" if node is None else self._names.get(node, node)

    def address_of(self, node: NodeId) -> str:
        return self._addresses[node]

    def node_of(self, node: NodeId) -> VirtualNode | None:
        """The PC on which it runs; None where its state folder was lost."""
        return next((each for each in self.nodes if each.id == node), None)

    def reach(self, one: VirtualNode, other: VirtualNode) -> bool:
        """Whether a call gets from one to the other, and its answer back."""
        here, there = one.pc.address, other.pc.address
        return one is other or (self.network.passes(here, there, dial=True) and self.network.passes(there, here))

    def running(self) -> list[VirtualNode]:
        """Those that an operator can talk to and that belong to the mesh."""
        return [node for node in self.nodes if node.up and not node.removed]

    def mesh_settings(self, bought: Pc) -> MeshSettings:
        return MeshSettings(MembershipSettings.paced(self.probe_seconds), addresses=(bought.address,))

    def touch(self, *nodes: VirtualNode) -> None:
        """Something was done to these: what their peers think of them for a while proves nothing."""
        for node in nodes:
            self._touched[node.name] = self.time.now
        self.callers.amiss_until = self.time.now

    # --- what loads do ------------------------------------------------------------------------------------------------

    def _why_load_fails(self, assignment: Assignment) -> str | None:
        return "the engine gave up" if self.fails and self.dice.random() < self.fails else None

    def _takes(self, assignment: Assignment, device: DeviceSnapshot) -> Bytes:
        memory = assignment.memory
        estimate = memory.weights + memory.kv_cache + memory.compute + memory.overhead
        return really_taken(self.seed, card_of(device), assignment.model, assignment.variant, estimate)

    # --- what nodes report --------------------------------------------------------------------------------------------

    def log(self, who: str, text: str, *args: object) -> None:
        """One line of the history."""
        if self._trace:
            self.history.append(f"{self.time.now:9.3f}  {who:<6} {text % args if args else text}")

    def log_packet(self, who: str, to: NodeId | None, envelope: Envelope) -> None:
        """One line for an envelope, where packets are traced."""
        news = "".join(
            f" {update.state}({self.name_of(update.node)},{update.incarnation})" for update in envelope.updates
        )
        news += "".join(f" {record.key}" for record in envelope.records)
        self.log(who, "-> %s %s%s root %016x", self.name_of(to), envelope.body, news, envelope.root)

    def sent(self, envelope: Envelope) -> None:
        """An envelope goes out; benchmarks count them."""

    def received(self, node: VirtualNode, envelope: Envelope) -> None:
        """An envelope came in; benchmarks count them."""

    def member_changed(
        self, node: VirtualNode, other: NodeId, before: MemberState | None, after: MemberState | None
    ) -> None:
        """Nobody who is well is taken for dead."""
        self.log(node.name, "sees %s as %s (was %s)", self.name_of(other), after, before)
        if after is not MemberState.DEAD or not self.calm:
            return
        meant = next((each for each in self.nodes if each.id == other), None)
        if meant is None or not meant.up or meant.removed or node.removed:
            return
        since = max(self._touched.get(meant.name, 0.0), self._touched.get(node.name, 0.0))
        if self.time.now - since > CALM_SECONDS:
            raise Breach(f"{node.name} takes {meant.name} for dead, and both are well")

    @property
    def calm(self) -> bool:
        """Whether the network has been well for a while."""
        if not self.network.whole or self.network.weather.loss > 0.02 or self.network.weather.slow:
            self._weather_until = self.time.now
        return self.time.now - self._weather_until > CALM_SECONDS

    def written(self, node: VirtualNode, record: Record) -> None:
        if prefix_of(record.key) == DEPLOYMENT:
            self.writes.note(record)
            if node.map.record(record.key) != record:
                raise Breach(f"{node.name} wrote {record.key}, and believes something else")

    def decided(self, node: VirtualNode, view: CoordinationView, before: Decision | None, decision: Decision) -> None:
        for refusal in decision.plan.refusals:
            self.log(node.name, "refuses %d of %s: %s", refusal.replicas_missing, refusal.model, refusal.remedy)
        for move in decision.moves:
            self.log(node.name, "moves %s to %s: %s", move.replica, move.target, move.gain)
        check_decision(view, before, decision)

    def ordered(self, node: VirtualNode, receiver: NodeId, assignments: Sequence[Assignment]) -> None:
        self.log(
            node.name,
            "orders %s to hold %s",
            self.name_of(receiver),
            ", ".join(f"{each.replica} {each.variant}" for each in assignments) or "nothing",
        )

    def obeys(self, node: VirtualNode) -> None:
        """A node does what its own coordinator says, and nobody else."""
        orders = orders_for(node.map, node.id)
        if orders is None or orders.coordinator != node.machine.view().coordinator:
            raise Breach(f"{node.name} obeys orders of somebody who does not coordinate")

    def fault(self, text: str, *nodes: VirtualNode) -> None:
        """Something was done to the mesh."""
        self.touch(*nodes)
        self.faults.append(f"{self.time.now:.1f} {text}")
        self.log("***", "%s", text)

    # --- the verdict --------------------------------------------------------------------------------------------------

    def settle(self) -> float:
        """Wait until everything is settled and stays so longer than the coordinator's patience; gives back when that began.

        Raises `Breach` where it takes too long.
        """
        began = self.time.now
        while self.time.now - began < SETTLE_SECONDS:
            self.time.run_until(self.time.now + 1.0)
            why = why_not_settled(self.nodes)
            quiet_since, acts = self.time.now, self._acts()
            while why is None and self.time.now - quiet_since < PATIENCE_SECONDS:
                self.time.run_until(self.time.now + 1.0)
                why = "something moves" if self._acts() != acts else None
            if why is None:
                return quiet_since - began
        raise Breach(f"not settled {SETTLE_SECONDS:.0f} s after the last fault: {why}")

    def stay_settled(self, seconds: float) -> None:
        """Nothing moves for so long."""
        before = self._acts()
        end = self.time.now + seconds
        while self.time.now < end:
            self.time.run_until(min(end, self.time.now + 5.0))
            if (after := self._acts()) != before:
                moved = next(name for name in after if after[name] != before.get(name))
                raise Breach(f"{moved} changes its orders, or loads or unloads, though nothing has happened")
        if (why := why_not_settled(self.nodes)) is not None:
            raise Breach(f"settled, and then no longer: {why}")
        for node in self.running():
            self.writes.check(node)

    def _acts(self) -> dict[str, tuple[int, int]]:
        """What each node has done so far about replicas."""
        return {node.name: (node.orders_written, node.executor.activity) for node in self.running()}

    def outcome(self, failure: str | None, settled_after: float) -> Outcome:
        return Outcome(
            seed=self.seed,
            failure=failure,
            nodes=len(self.nodes),
            virtual_seconds=self.time.now,
            steps=self.time.steps,
            packets=self.network.packets,
            settled_after=settled_after,
            decisions=sum(node.decisions for node in self.nodes),
            loads=sum(node.executor.activity for node in self.nodes if node.boots),
            faults=self.faults,
            history=self.history,
            calls=self.callers.tally,
        )

    def lose_disk(self, node: VirtualNode) -> None:
        """What only this node's disk had is gone; tell the model of what operators did."""
        self.writes.disk_lost(node, [each for each in self.nodes if each is not node and each.lasting])
