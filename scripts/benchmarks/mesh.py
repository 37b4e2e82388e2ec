"""`scripts/bench mesh`: what membership, the replicated map and the planner cost as a mesh grows, and how soon a dead node is known.

Law of this file: the real core machines on virtual time, the wire's real codec for bytes, and this machine's clock only for CPU. Growth is
asked of a mesh at rest: every node alive, every map equal, nothing new to tell. Bytes are those of the envelopes' JSON: what HTTP and TLS
put around them depends on kept connections, not on the mesh's size. Of the CPU the machine's calls of functions are held to the aim: all
nodes share this process and its caches, so that the same calls take longer the more nodes it holds, which no PC of a mesh sees.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from engine_results import Aim, quantile, verdict

sys.path.insert(0, str(Path(__file__).parents[1] / "simulation"))
from virtual_fleet import Pc, models, pc
from virtual_network import Answer, VirtualNetwork
from virtual_time import VirtualTime

from tars.core.coordination import Coordination
from tars.core.coordination_view import CoordinationView
from tars.core.hybrid_clock import HybridClock
from tars.core.mesh_events import Effect, Event, MemberChanged, NotSent, Received, Send, Tick
from tars.core.mesh_machine import MeshMachine, MeshSettings
from tars.core.mesh_messages import Envelope, MemberState, Record
from tars.core.records import Member, NodeAdvert, Orders, ReplicaReport, Wish
from tars.core.replicated_map import MEMBER, NODE, ReplicatedMap
from tars.core.types import Assignment, Bytes, Deployment, NodeId, NodeSnapshot, ReplicaState
from tars.mesh.record_codec import decode_envelope, encode_envelope

SIZES = (2, 10, 100, 1000)
WALL_MS = 1_750_000_000_000
SETTLE_SECONDS, MEASURE_SECONDS, LARGE_MEASURE_SECONDS = 8.0, 10.0, 3.0
"""Virtual: until the states are those of all nodes, and what is measured; with 1,000 nodes less of it has 6,000 probes."""
CALLS_SECONDS = 2.0
"""Virtual, in which calls are counted: each second has the same probes."""
MOST_SETTLE_SECONDS = 120.0
"""Until start-up's news is told, which nobody is short of: most of 1,000 nodes that start within a second are suspected by somebody who
probes them before they listen, and each packet carries so much."""
REST_MESSAGES_PER_SECOND = 4.5
"""Of a node: two probes and two answers, and something is lost or asked again now and then."""
LEAST_DEATHS, MOST_DEATHS = 4, 60
"""Per size; each is seen by all survivors, so a large mesh needs few for as many times."""
DETECTION_WAIT_SECONDS = 30.0


class Traffic:
    """What all nodes sent, and the CPU that it took them."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        self.machine_seconds = self.codec_seconds = 0.0
        self.calls: cProfile.Profile | None = None
        """Where the machines' calls are counted, which makes them several times slower."""

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]  # a fresh count


class BareNode:
    """A mesh machine on the virtual network: no models, no orders, only staying one mesh."""

    def __init__(self, bought: Pc, mesh: BareMesh):
        self.pc, self._mesh = bought, mesh
        self.map = ReplicatedMap(bought.node, HybridClock(bought.node))
        dice = random.Random(f"{mesh.seed}/{bought.name}")
        self.machine = MeshMachine(bought.node, self.map, MeshSettings(addresses=(bought.address,)), dice)
        self.alive = True
        self._tick_at = float("inf")

    def start(self, records: Sequence[Record]) -> None:
        self.map.merge(records, WALL_MS)
        self._mesh.network.listen(self.pc.address, self._serve)
        self.tell(Tick())

    def stop(self) -> None:
        self.alive = False
        self._mesh.network.listen(self.pc.address, None)

    def tell(self, event: Event, asker: NodeId | None = None) -> list[Envelope]:
        if not self.alive:
            return []
        mesh, traffic = self._mesh, self._mesh.traffic
        now = mesh.time.now
        if traffic.calls is not None:
            traffic.calls.enable(subcalls=False)
        began = time.process_time_ns()
        effects = self.machine.handle(event, now, WALL_MS + int(now * 1000))
        due = self.machine.next_due(now)
        traffic.machine_seconds += (time.process_time_ns() - began) / 1e9
        if traffic.calls is not None:
            traffic.calls.disable()
        answers = []
        for effect in effects:
            if isinstance(effect, Send):
                if asker is not None and effect.to == asker:
                    answers.append(effect.envelope)
                else:
                    self._send(effect)
            else:
                self._note(effect)
        if due < self._tick_at:
            self._tick_at = due
            mesh.time.at(due, lambda: self._tick(due))
        return answers

    def _note(self, effect: Effect) -> None:
        if isinstance(effect, MemberChanged) and effect.after is MemberState.DEAD:
            self._mesh.deaths_seen.append((self.pc.node, effect.node, self._mesh.time.now))

    def _tick(self, due: float) -> None:
        if due == self._tick_at:
            self._tick_at = float("inf")
            self.tell(Tick())

    def _send(self, effect: Send) -> None:
        if not effect.addresses:
            return
        number = getattr(effect.envelope.body, "number", None)

        def done(answers: Sequence[Envelope] | None) -> None:
            if answers is None:
                self.tell(NotSent(effect.to, number))
            for answer in answers or ():
                self.tell(Received(answer))

        self._mesh.network.exchange(self.pc.address, effect.addresses[0], self._mesh.wire(effect.envelope), done)

    def _serve(self, envelope: Envelope, answer: Answer) -> None:
        answers = self.tell(Received(envelope), envelope.sender)
        answer([self._mesh.wire(each) for each in answers])


class BareMesh:
    """So many bare nodes that know each other."""

    def __init__(self, size: int, seed: int):
        self.seed = seed
        self.bytes_too = False
        """Whether envelopes go through the wire's codec, which costs as much as the machines."""
        self.time = VirtualTime()
        self.network = VirtualNetwork(self.time, random.Random(f"{seed}/network"))
        self.traffic = Traffic()
        self.deaths_seen: list[tuple[NodeId, NodeId, float]] = []
        dice = random.Random(seed)
        fleet = [pc(dice, number) for number in range(size)]
        self.nodes = [BareNode(bought, self) for bought in fleet]
        first = ReplicatedMap(fleet[0].node)
        records = [
            first.put(MEMBER + each.node, Member(each.node, each.name, f"{each.node}-key", (each.address,)), WALL_MS)
            for each in fleet
        ]
        for each in fleet:
            own = ReplicatedMap(each.node)
            advert = NodeAdvert(NodeSnapshot(each.node, each.name, each.devices))
            records.append(own.put(NODE + each.node, advert, WALL_MS))
        for node in self.nodes:
            self.time.at(dice.random(), lambda node=node: node.start(records))  # type: ignore[misc]

    def wire(self, envelope: Envelope) -> Envelope:
        """What is left of it after it went through the wire's codec; counted."""
        self.traffic.messages += 1
        if not self.bytes_too:
            return envelope
        began = time.process_time_ns()
        text = orjson.dumps(encode_envelope(envelope))
        envelope = decode_envelope(orjson.loads(text))
        self.traffic.codec_seconds += (time.process_time_ns() - began) / 1e9
        self.traffic.bytes += len(text)
        return envelope


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one node, per virtual second, in a mesh of `nodes` at rest."""

    nodes: int
    bytes_per_second: float
    messages_per_second: float
    calls_per_second: float
    """Of functions, by the machine."""
    machine_ms: float
    """CPU of the machine alone."""
    codec_ms: float


def measure_growth(mesh: BareMesh) -> Growth:
    """Afterwards the mesh is at rest, and counts no more bytes."""
    size = len(mesh.nodes)
    mesh.time.run_until(1.0 + SETTLE_SECONDS)
    rate = messages_per_second(mesh)
    while rate > REST_MESSAGES_PER_SECOND and mesh.time.now < MOST_SETTLE_SECONDS:
        rate = messages_per_second(mesh)
    roots = {node.map.root for node in mesh.nodes}
    if len(roots) != 1 or mesh.deaths_seen or rate > REST_MESSAGES_PER_SECOND:
        raise RuntimeError(
            f"a mesh of {size} nodes is not at rest after {mesh.time.now:.0f} virtual seconds: {rate:.1f} messages a node and second, "
            f"{len(roots)} different maps, deaths {mesh.deaths_seen[:2]}"
        )
    mesh.traffic.calls = cProfile.Profile()
    mesh.time.run_until(mesh.time.now + CALLS_SECONDS)
    calls = sum(row.callcount for row in mesh.traffic.calls.getstats())
    mesh.traffic.clear()
    mesh.bytes_too = True
    seconds = MEASURE_SECONDS if size < 1000 else LARGE_MEASURE_SECONDS
    mesh.time.run_until(mesh.time.now + seconds)
    each = size * seconds
    traffic = mesh.traffic
    mesh.bytes_too = False
    return Growth(
        size,
        traffic.bytes / each,
        traffic.messages / each,
        calls / (size * CALLS_SECONDS),
        1000 * traffic.machine_seconds / each,
        1000 * traffic.codec_seconds / each,
    )


def messages_per_second(mesh: BareMesh) -> float:
    """Of a node, in the next virtual second."""
    before = mesh.traffic.messages
    mesh.time.run_until(mesh.time.now + 1.0)
    return (mesh.traffic.messages - before) / len(mesh.nodes)


def measure_detection(mesh: BareMesh, deaths: int, seed: int) -> tuple[list[float], int]:
    """Seconds from a death until each survivor knows of it; and how many live nodes were taken for dead meanwhile.

    It begins with `mesh`, at rest (a start of 1,000 nodes costs more than all that is measured), and makes others of its size.
    """
    size = len(mesh.nodes)
    dice = random.Random(f"{seed}/deaths")
    times: list[float] = []
    wrong = 0
    left = deaths
    while left:
        if size <= 2 and left < deaths:
            mesh = BareMesh(size, seed + deaths - left)
            mesh.time.run_until(1.0 + SETTLE_SECONDS)
        left -= 1
        mesh.time.run_until(mesh.time.now + dice.random())
        living = [node for node in mesh.nodes if node.alive]
        if len(living) <= max(1, size // 2):
            mesh = BareMesh(size, seed + 1000 + left)
            mesh.time.run_until(1.0 + SETTLE_SECONDS + dice.random())
            living = mesh.nodes
        victim = dice.choice(living)
        died = mesh.time.now
        victim.stop()
        mesh.deaths_seen.clear()
        survivors = {node.pc.node for node in living if node is not victim}
        while mesh.time.now - died < DETECTION_WAIT_SECONDS:
            mesh.time.run_until(mesh.time.now + 0.5)
            if survivors <= {seer for seer, seen, _ in mesh.deaths_seen if seen == victim.pc.node}:
                break
        known = {seer: when - died for seer, seen, when in mesh.deaths_seen if seen == victim.pc.node}
        times += [known.get(node, DETECTION_WAIT_SECONDS) for node in sorted(survivors)]
        wrong += sum(seen != victim.pc.node for _, seen, _ in mesh.deaths_seen)
    return times, wrong


# --- planning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planning:
    """1,000 devices, 300 replicas: seconds of CPU, and what a node's loss does."""

    devices: int
    replicas: int
    from_nothing_seconds: float
    at_rest_seconds: float
    after_a_loss_seconds: float
    lost: int
    """Replicas that were on the lost node."""
    moved: int
    """Healthy replicas on other nodes that the loss moved."""


def measure_planning(devices: int, replicas: int, seed: int) -> Planning:
    dice = random.Random(seed)
    fleet: list[Pc] = []
    while sum(len(each.devices) for each in fleet) < devices:
        fleet.append(pc(dice, len(fleet)))
    adverts = [NodeAdvert(NodeSnapshot(each.node, each.name, each.devices)) for each in fleet]
    kinds = sorted(models())
    share, rest = divmod(replicas, len(kinds))
    wishes = tuple(Wish(Deployment(name, replicas=share + (index < rest))) for index, name in enumerate(kinds))
    coordination = Coordination()

    def decide(adverts: Sequence[NodeAdvert], now: float, orders: dict[NodeId, Orders]) -> tuple[Any, float]:
        view = CoordinationView(tuple(adverts), wishes, now, orders, models(), hub=True)
        gc.collect()
        began = time.process_time()
        decision = coordination.decide(view)
        return decision, time.process_time() - began

    decision, first_seconds = decide(adverts, 0.0, {})
    orders: dict[NodeId, Orders] = {}
    now, coordinator = 0.0, min(each.node for each in fleet)
    # Carry out what is ordered, in an instant, until nothing more is.
    for _ in range(400):
        fresh = {node: Orders(node, coordinator, given) for node, given in decision.orders.items()}
        adverts = [_carried_out(advert, fresh[advert.node.id].assignments) for advert in adverts]
        done = {node: each.assignments for node, each in orders.items()} == dict(decision.orders)
        orders, now = fresh, now + 1.0
        decision, rest_seconds = decide(adverts, now, orders)
        if done:
            break
    placed = [each for given in decision.orders.values() for each in given]
    loads = {node: sum(each.node == node for each in placed) for node in orders}
    victim = max(sorted(loads), key=lambda node: loads[node])
    left = [advert for advert in adverts if advert.node.id != victim]
    after, loss_seconds = decide(left, now + 1.0, {node: each for node, each in orders.items() if node != victim})
    kept = {each.replica: each.device for given in after.orders.values() for each in given}
    moved = sum(kept.get(each.replica) != each.device for each in placed if each.node != victim)
    return Planning(
        sum(len(each.devices) for each in fleet),
        len(placed),
        first_seconds,
        rest_seconds,
        loss_seconds,
        loads[victim],
        moved,
    )


def _carried_out(advert: NodeAdvert, assignments: Sequence[Assignment]) -> NodeAdvert:
    """The node once it holds these: ready, measured as estimated."""
    held: dict[str, int] = {}
    for each in assignments:
        held[each.device] = held.get(each.device, 0) + each.memory.total
    devices = tuple(
        replace(
            device,
            memory_held=Bytes(held.get(device.id, 0)),
            memory_free=Bytes(device.memory_total - held.get(device.id, 0)),
        )
        for device in advert.node.devices
    )
    reports = tuple(
        ReplicaReport(each, models()[each.model].kind, ReplicaState.READY, taken=each.memory.total)
        for each in assignments
    )
    return replace(advert, node=replace(advert.node, devices=devices), replicas=reports)


# --- the report ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measures, prints, and says which aims were reached."""
    parser = argparse.ArgumentParser(prog="scripts/bench mesh", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="numbers of nodes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    asked = parser.parse_args()
    if min(asked.sizes) < 2:
        parser.error("a mesh has at least 2 nodes")
    asked.sizes = sorted(set(asked.sizes))
    aims: list[Aim] = []

    print("A mesh at rest, each node, per virtual second")
    print(f"{'nodes':>6} {'bytes':>9} {'messages':>9} {'calls':>7} {'CPU, machine':>13} {'CPU, codec':>11}")
    growth = []
    meshes: dict[int, BareMesh] = {}
    for size in asked.sizes:
        meshes[size] = BareMesh(size, asked.seed)
        found = measure_growth(meshes[size])
        growth.append(found)
        print(
            f"{size:>6} {found.bytes_per_second:9.0f} {found.messages_per_second:9.2f} {found.calls_per_second:7.0f} "
            f"{found.machine_ms:10.3f} ms {found.codec_ms:8.3f} ms",
            flush=True,
        )
    grown = [each for each in growth if each.nodes >= 10]
    if len(grown) > 1:
        for what, value in (
            ("bytes", "bytes_per_second"),
            ("messages", "messages_per_second"),
            ("calls of functions", "calls_per_second"),
        ):
            numbers = [getattr(each, value) for each in grown]
            spread = max(numbers) / min(numbers)
            aims.append(
                Aim(
                    f"{what} a node and second, the largest to the smallest of {grown[0].nodes} to {grown[-1].nodes} nodes",
                    spread,
                    at_most=1.2,
                )
            )

    print("\nFrom a node's death until its peers know (network of 1 to 2 ms), seconds")
    print(f"{'nodes':>6} {'deaths':>7} {'p50':>6} {'p99':>6} {'most':>6}  live nodes taken for dead")
    detection = []
    for size in asked.sizes:
        deaths = max(LEAST_DEATHS, min(MOST_DEATHS, 1000 // size))
        times, wrong = measure_detection(meshes.pop(size), deaths, asked.seed)
        row = {
            "nodes": size,
            "deaths": deaths,
            "p50": statistics.median(times),
            "p99": quantile(times, 0.99),
            "most": max(times),
            "wrong": wrong,
        }
        detection.append(row)
        print(f"{size:>6} {deaths:>7} {row['p50']:6.2f} {row['p99']:6.2f} {row['most']:6.2f}  {wrong}", flush=True)
        aims.append(Aim(f"seconds to know of a death, p99, {size} nodes", row["p99"], at_most=5.0))
    aims.append(Aim("live nodes taken for dead", float(sum(row["wrong"] for row in detection)), at_most=0.0))

    planning = measure_planning(1000, 300, asked.seed)
    print(
        f"\nPlanning {planning.devices} devices x {planning.replicas} replicas: {planning.from_nothing_seconds:.2f} s from nothing, "
        f"{planning.at_rest_seconds:.2f} s with all in place, {planning.after_a_loss_seconds:.2f} s after a node's loss"
    )
    print(f"The loss of the fullest node ({planning.lost} replicas) moves {planning.moved} healthy ones")
    worst = max(planning.from_nothing_seconds, planning.at_rest_seconds, planning.after_a_loss_seconds)
    aims.append(Aim("seconds of planning, 1,000 devices x 300 replicas, the slowest of the three", worst, at_most=2.0))
    aims.append(Aim("healthy replicas that one node's loss moves", float(planning.moved), at_most=0.0))

    print()
    for aim in aims:
        print(aim)
    print(verdict(aims))
    if asked.json is not None:
        report = {
            "growth": [asdict(each) for each in growth],
            "detection": detection,
            "planning": asdict(planning),
            "aims": [aim.to_json() for aim in aims],
        }
        asked.json.write_text(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
