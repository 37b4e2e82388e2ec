"""Mesh machines on virtual time and a seeded network of datagrams: for tests of `core/` that need more than one machine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from tars.core.mesh_events import MemberChanged, NotSent, Received, Send, Tick
from tars.core.mesh_machine import MeshMachine, MeshSettings
from tars.core.mesh_messages import MemberState
from tars.core.records import Member
from tars.core.replicated_map import MEMBER, ReplicatedMap
from tars.core.types import NodeId

EPOCH_MS = 1_700_000_000_000


def name(number: int) -> NodeId:
    return NodeId(f"node-{number:04d}")


class Network:
    """`count` members that know each other's records. Time is virtual; loss, delay and the dice come from `seed`."""

    def __init__(
        self,
        count: int,
        seed: int = 0,
        *,
        loss: float = 0.0,
        delay: Callable[[random.Random], float] = lambda dice: dice.uniform(0.0005, 0.005),
        settings: MeshSettings | None = None,
        refuses: bool = False,
    ):
        self.now = 0.0
        self.loss, self.delay, self.refuses = loss, delay, refuses
        self.settings = settings or MeshSettings()
        self.dice = random.Random(seed)
        self.machines: dict[NodeId, MeshMachine] = {}
        self.cut: Callable[[NodeId, NodeId], bool] = lambda sender, to: False
        self.changes: list[tuple[float, NodeId, MemberChanged]] = []
        self.effects: list[tuple[float, NodeId, object]] = []
        self.sent: Counter[NodeId] = Counter()
        self.sizes: Counter[NodeId] = Counter()
        self.size_of: Callable[[object], int] | None = None
        self._queue: list[tuple[float, int, NodeId, object]] = []
        self._pushed = 0
        self._ticks: dict[NodeId, float] = {}
        self._paused: dict[NodeId, float] = {}
        writer = ReplicatedMap(name(0))
        self.members = [
            writer.put(MEMBER + name(n), Member(name(n), f"pc {n}", "00", (f"{name(n)}:1",)), EPOCH_MS)
            for n in range(count)
        ]
        for number in range(count):
            self.start(name(number))

    def start(self, node: NodeId, records: ReplicatedMap | None = None) -> MeshMachine:
        """Start a node, or start it anew with the records it had (default: the members' only)."""
        if records is None:
            records = ReplicatedMap(node)
            records.merge(self.members, EPOCH_MS)
        machine = MeshMachine(
            node,
            records,
            self.settings if self.settings.addresses else self._with_address(node),
            random.Random(self.dice.random()),
        )
        self.machines[node] = machine
        self._push(self.now + self.dice.random() * 0.5, node, Tick())
        return machine

    def _with_address(self, node: NodeId) -> MeshSettings:
        return MeshSettings(membership=self.settings.membership, addresses=(f"{node}:1",))

    def crash(self, node: NodeId) -> MeshMachine:
        return self.machines.pop(node)

    def pause(self, node: NodeId, seconds: float) -> None:
        """What comes meanwhile waits, and so do its ticks."""
        self._paused[node] = self.now + seconds

    def tell(self, node: NodeId, event: object) -> None:
        """An event from outside, now."""
        self._handle(node, event)

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass; True as soon as `until` is so, looked at after every event."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, node, event = heappop(self._queue)
            if node not in self.machines:
                continue
            if (paused := self._paused.get(node, 0.0)) > self.now:
                self._push(paused, node, event)
                continue
            self._handle(node, event)
            if until is not None and until():
                return True
        self.now = end
        return until() if until is not None else False

    def state(self, observer: int | NodeId, observed: int | NodeId) -> MemberState:
        observer = name(observer) if isinstance(observer, int) else observer
        observed = name(observed) if isinstance(observed, int) else observed
        return self.machines[observer].view().members[observed].state

    def all_see(self, observed: int, state: MemberState, observers: Iterable[NodeId] | None = None) -> bool:
        """Whether every running node but the observed one sees it in this state."""
        who = [node for node in (observers or self.machines) if node != name(observed)]
        return all(self.machines[node]._membership.state_of(name(observed)) is state for node in who)

    def _push(self, at: float, node: NodeId, event: object) -> None:
        self._pushed += 1
        heappush(self._queue, (at, self._pushed, node, event))

    def _handle(self, node: NodeId, event: object) -> None:
        machine = self.machines[node]
        if isinstance(event, Tick):
            self._ticks.pop(node, None)
        for effect in machine.handle(event, self.now, EPOCH_MS + int(self.now * 1000)):  # type: ignore[arg-type]
            if isinstance(effect, Send):
                self._carry(node, effect)
            else:
                self.effects.append((self.now, node, effect))
                if isinstance(effect, MemberChanged):
                    self.changes.append((self.now, node, effect))
        due = machine.next_due(self.now)
        if due < self._ticks.get(node, float("inf")):
            self._ticks[node] = due
            self._push(max(due, self.now), node, Tick())

    def _carry(self, sender: NodeId, send: Send) -> None:
        self.sent[sender] += 1
        if self.size_of is not None:
            self.sizes[sender] += self.size_of(send.envelope)
        to = send.to or NodeId(send.addresses[0].rpartition(":")[0])
        if self.cut(sender, to) or self.dice.random() < self.loss:
            return
        if to in self.machines:
            self._push(self.now + self.delay(self.dice), to, Received(send.envelope))
        elif self.refuses:
            number = getattr(send.envelope.body, "number", None)
            self._push(self.now + self.delay(self.dice), sender, NotSent(send.to, number))
