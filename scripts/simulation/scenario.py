"""What happens in a seed: who is there, what operators do, what goes wrong; then everything is healed and must come to rest.

Law of this file: all of it from the seed's own dice. Adding a kind of fault changes what the seeds mean, and that is all right.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

from breach import Breach
from steady_overload import Overload
from virtual_fleet import Pc
from virtual_network import Weather
from virtual_node import Power, VirtualNode
from world import Outcome, World

from tars.core.records import Member, Wish
from tars.core.replicated_map import DEPLOYMENT, MEMBER
from tars.core.types import Bytes, Deployment, NodeId, ReplicaState

TROUBLE_SECONDS = (6.0, 18.0)
"""How long things go wrong."""
QUIET_SECONDS = 12.0
"""With the quiet that `World.settle` waited for it is longer than every patience of `world.QUICK`."""
LONG_QUIET_SECONDS = 60.0
LONG_QUIET_SHARE = 0.05
OVERLOAD_EVERY = 16
"""So many seeds have one with a steady overload in place of troubles."""


def simulate(seed: int, *, trace: bool = False, packets: bool = False) -> Outcome:
    """Run one seed to its verdict. Never raises: what was raised is the outcome's `failure`."""
    world = World(seed, trace=trace or packets, packets=packets)
    failure, settled_after = None, 0.0
    try:
        long = random.Random(f"{seed}/quiet").random() < LONG_QUIET_SHARE
        if seed % OVERLOAD_EVERY == OVERLOAD_EVERY - 1:
            Overload(world).run()
        else:
            scenario = Scenario(world)
            scenario.trouble()
            scenario.heal()
        settled_after = world.settle()
        world.log("***", "settled after %.0f s", settled_after)
        world.stay_settled(LONG_QUIET_SECONDS if long else QUIET_SECONDS)
        world.callers.check_over()
    except Breach as breach:
        failure = str(breach)
    except Exception:  # noqa: BLE001 - whatever the core raised is the finding
        failure = traceback.format_exc()
    if failure is not None:
        world.log("***", "FAILED: %s", failure)
    return world.outcome(failure, settled_after)


class Scenario:
    """The dice of one seed, thrown for its world."""

    def __init__(self, world: World):
        self.world = world
        self.dice = random.Random(f"{world.seed}/scenario")
        self.lasts = self.dice.uniform(*TROUBLE_SECONDS)
        self._begin()

    def _begin(self) -> None:
        """The first PC makes the mesh; the others join, most of them early."""
        world, dice = self.world, self.dice
        first = world.new_node()
        first.found()
        for _ in range(dice.choice((1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 7))):
            node = world.new_node()
            world.time.at(
                dice.uniform(0.1, 2.0) if dice.random() < 0.9 else dice.uniform(2.0, self.lasts), self._join(node)
            )
        for _ in range(dice.randint(1, 4)):
            world.time.at(dice.uniform(0.5, 4.0), self._deploy)
        acts = (
            (self._deploy, 3),
            (self._undeploy, 2),
            (self._drain, 2),
            (self._undrain, 2),
            (self._foreign, 3),
            (self._leave, 1),
            (self._remove_node, 1),
        )
        faults = (
            (self._crash, 4),
            (self._pause, 3),
            (self._partition, 5),
            (self._weather, 3),
            (self._clock, 2),
            (self._worker_dies, 1),
            (self._loads_fail, 1),
            (self._worker_freezes, 2),
        )
        self.callers = random.Random(f"{world.seed}/calls")
        for _ in range(self.callers.randint(0, 24)):
            world.time.at(self.callers.uniform(2.0, self.lasts + 3.0), self._call)
        for kinds, most in ((acts, 6), (faults, 6)):
            weighted = [kind for kind, weight in kinds for _ in range(weight)]
            for _ in range(dice.randint(0, most)):
                world.time.at(dice.uniform(3.0, self.lasts), dice.choice(weighted))

    def trouble(self) -> None:
        """Let everything happen that was thrown."""
        self.world.time.run_until(self.lasts)

    def heal(self) -> None:
        """Nobody is cut off, everybody who is not gone for good runs, no load fails any more."""
        world = self.world
        world.log("***", "heals")
        world.network.heal()
        world.network.weather = Weather()
        world.fails = 0.0
        for node in list(world.nodes):
            if node.power is Power.PAUSED:
                node.resume()
            elif node.boots and node.returns:
                self._back(node)

    # --- operators ----------------------------------------------------------------------------------------------------

    def _join(self, node: VirtualNode) -> Callable[[], None]:
        def join() -> None:
            if node.power is not Power.DOWN:
                return  # while it waited for a host, it was brought back by somebody else
            hosts = self.world.running()
            if hosts:
                node.join(self.dice.choice(hosts))
                self.world.touch(*self.world.nodes)
            else:
                self.world.time.after(1.0, join)

        return join

    def _spread(self, node: VirtualNode) -> bool:
        """Whether the mesh stays one without this node's disk.

        Whom it admitted or removed somebody else knows; and the others can still find each other: a PC that was away while others joined
        believes only a member that it knows (a removed node has the CA's key, too). Without that an operator would have to let it join
        again.
        """
        others = [each for each in self.world.nodes if each is not node and each.lasting]
        known = [record for key, record in node.disk.records.items() if key.startswith(MEMBER)]
        return _linked(others) and all(
            any(other.disk.records.get(record.key) == record for other in others if MEMBER + other.id != record.key)
            for record in known
            if record.key != MEMBER + node.id
        )

    def _somebody(self) -> VirtualNode | None:
        running = self.world.running()
        return self.dice.choice(running) if running else None

    def _deploy(self) -> None:
        node = self._somebody()
        if node is None:
            return
        name = self.dice.choice(sorted(self.world.models))
        deployment = Deployment(
            name,
            replicas=self.dice.choice((1, 1, 2, 3)),
            context=self.dice.choice((None, 2048)),
            priority=self.dice.choice((0, 0, 1)),
        )
        self.world.fault(f"deploys {deployment.replicas} x {name} at {node.name}")
        node.write(DEPLOYMENT + name, Wish(deployment))

    def _undeploy(self) -> None:
        node = self._somebody()
        wanted = [] if node is None else [key for key, _ in node.map.items(DEPLOYMENT)]
        if node is not None and wanted:
            key = self.dice.choice(wanted)
            self.world.fault(f"removes {key} at {node.name}")
            node.write(key, None)

    def _drain(self) -> None:
        node = self._somebody()
        if node is not None and not node.draining:
            self.world.fault(f"drains {node.name}")
            node.set_draining(True)

    def _undrain(self) -> None:
        drained = [node for node in self.world.running() if node.draining]
        if drained:
            node = self.dice.choice(drained)
            self.world.fault(f"gives {node.name} back")
            node.set_draining(False)

    def _foreign(self) -> None:
        """A game begins on a card, and usually ends."""
        node = self._somebody()
        if node is None or not node.pc.devices:
            return
        device = self.dice.choice(node.pc.devices)
        wanted = Bytes(int(device.memory_total * self.dice.uniform(0.05, 0.95)))
        self.world.fault(f"a foreign program on {device.id} wants {wanted}")
        self._set_foreign(node, device.id, wanted)
        if self.dice.random() < 0.7:
            seconds = self.dice.uniform(1.0, 12.0)
            if self.world.time.now + seconds < self.lasts:
                self.world.time.after(seconds, lambda: self._set_foreign(node, device.id, 0))

    def _set_foreign(self, node: VirtualNode, device: object, wanted: int) -> None:
        self.world.foreign.setdefault(node.name, {})[device] = wanted  # type: ignore[index]
        if node.runs and device in node.executor.cards:
            node.executor.foreign(device, wanted)  # type: ignore[arg-type]
            node.foreign_changed()

    def _leave(self) -> None:
        running = self.world.running()
        if len(running) < 2:
            return
        node = self.dice.choice(running)
        back = self.dice.random() < 0.6 or not self._spread(node)
        self.world.fault(f"{node.name} leaves, {'for a while' if back else 'for good'}", node)
        node.leave()
        node.returns = back
        if back:
            self.world.time.after(self.dice.uniform(0.5, 10.0), lambda: self._back(node))
        else:
            self.world.lose_disk(node)

    def _remove_node(self) -> None:
        """An operator removes a PC from the mesh, by any other one."""
        world = self.world
        others = [node for node in world.nodes if node.boots and not node.removed]
        hosts = world.running()
        if len(hosts) < 2 or self.dice.random() < 0.3:
            return
        host = self.dice.choice(hosts)
        node = self.dice.choice([each for each in others if each is not host])
        known = host.map.get(MEMBER + node.id)
        if not isinstance(known, Member) or not self._spread(node):
            return
        world.fault(f"removes the node {node.name} at {host.name}", node)
        node.removed = True
        world.lose_disk(node)
        host.write(MEMBER + node.id, replace(known, removed=True))

    # --- callers ------------------------------------------------------------------------------------------------------

    def _call(self) -> None:
        """Somebody calls a model that is there, mostly; sometimes twice under one key, and sometimes he does not wait for the answer."""
        world, dice = self.world, self.callers
        ready = sorted(
            {
                each.assignment.model
                for node in world.running()
                for each in node.executor.all()
                if each.state is ReplicaState.READY
            }
        )
        if not ready or dice.random() < 0.1:
            ready = sorted(world.models)
        model = dice.choice(ready)
        kind = world.models[model].kind
        chance = dice.random()
        if chance < 0.15:
            key = f"key-{dice.getrandbits(32):08x}"
            first = world.callers.call(model, kind, key=key)
            for _ in range(dice.choice((1, 1, 2))):
                world.time.after(
                    dice.choice((0.0, 0.01, dice.uniform(0.0, 3.0))),
                    lambda: world.callers.call(model, kind, key=key, work=first.work),
                )
            return
        caller = world.callers.call(model, kind)
        if chance > 0.93:
            world.time.after(dice.uniform(0.0, 1.5), caller.leave)

    # --- faults -------------------------------------------------------------------------------------------------------

    def _crash(self) -> None:
        running = [node for node in self.world.nodes if node.runs and not node.removed]
        if not running:
            return
        node = self.dice.choice(running)
        chance = self.dice.random()
        last = not self._spread(node)
        if chance < 0.15 and len(running) > 2 and not last:
            self.world.fault(f"{node.name} breaks for good", node)
            node.crash()
            node.power = Power.GONE
            self.world.lose_disk(node)
            return
        seconds = self.dice.uniform(0.2, 15.0)
        self.world.fault(f"{node.name} crashes for {seconds:.1f} s", node)
        node.crash()
        if 0.15 <= chance < 0.3 and len(running) > 1 and not last:
            self._lose_state(node, identity=chance < 0.22)
        self.world.time.after(seconds, lambda: self._back(node))

    def _lose_state(self, node: VirtualNode, *, identity: bool) -> None:
        """The disk breaks: only the records are lost, or the whole state folder, and then it is a new node."""
        world = self.world
        world.lose_disk(node)
        if identity:
            world.fault(f"{node.name} loses its state folder")
            fresh = NodeId(f"{self.dice.getrandbits(32):08x}")
            devices = tuple(
                replace(device, id=type(device.id)(f"{fresh}/{device.id.rpartition('/')[2]}"), node=fresh)
                for device in node.pc.devices
            )
            node.pc = Pc(node.pc.name, fresh, devices, node.pc.priority)
            world.register(node.pc)
            world.foreign.pop(node.name, None)
            node.disk.records.clear()
            node.disk.draining = False
            node.left = False
        else:
            world.fault(f"{node.name} loses its records")
            member = node.disk.records
            # Its identity has its own file, and the addresses of peers that it was told stand in its configuration.
            node.disk.records = {key: record for key, record in member.items() if key.startswith(MEMBER)}

    def _back(self, node: VirtualNode) -> None:
        world = self.world
        if node.power is not Power.DOWN or node.removed:
            return
        if MEMBER + node.id not in node.disk.records:
            self._join(node)()
        else:
            node.start()
        world.touch(node)

    def _pause(self) -> None:
        node = self._somebody()
        if node is None:
            return
        seconds = self.dice.uniform(0.3, 12.0)
        self.world.fault(f"{node.name} is paused for {seconds:.1f} s", node)
        node.pause()

        def go_on() -> None:
            if node.power is Power.PAUSED:
                self.world.touch(node)
                self.world.log(node.name, "goes on")
                node.resume()

        self.world.time.after(seconds, go_on)

    def _partition(self) -> None:
        world, dice = self.world, self.dice
        nodes = list(world.nodes)
        if len(nodes) < 2:
            return
        dice.shuffle(nodes)
        some = nodes[: dice.randint(1, len(nodes) - 1)]
        here = [node.pc.address for node in some]
        there = [node.pc.address for node in nodes if node not in some]
        kind = dice.choice(("both ways", "both ways", "one way", "cannot dial"))
        names = ", ".join(node.name for node in some)
        world.fault(f"{names} cut off, {kind}", *nodes)
        world.network.cut(here, there, dial_only=kind == "cannot dial")
        if kind == "both ways":
            world.network.cut(there, here)
        seconds = dice.uniform(0.5, 15.0)

        def heal() -> None:
            world.touch(*world.nodes)
            world.log("***", "the network is whole")
            world.network.heal()

        world.time.after(seconds, heal)

    def _weather(self) -> None:
        world, dice = self.world, self.dice
        weather = Weather(
            delay=dice.choice((0.001, 0.03, 0.1)),
            jitter=dice.choice((0.001, 0.03, 0.2)),
            loss=dice.choice((0.0, 0.02, 0.1, 0.3)),
            duplication=dice.choice((0.0, 0.05, 0.2)),
            slow=dice.choice((0.0, 0.0, 0.1)),
        )
        world.fault(f"weather: {weather}", *world.nodes)
        world.network.weather = weather

        def clear() -> None:
            world.touch(*world.nodes)
            world.network.weather = Weather()

        world.time.after(dice.uniform(2.0, 12.0), clear)

    def _clock(self) -> None:
        node = self._somebody()
        if node is not None:
            jump = self.dice.choice((1.0, -1.0)) * self.dice.choice((0.5, 30.0, 7200.0, 2e6))
            self.world.fault(f"the clock of {node.name} jumps by {jump:g} s")
            node.skew += jump

    def _worker_dies(self) -> None:
        ready = [
            (node, running)
            for node in self.world.running()
            for running in node.executor.all()
            if running.state is ReplicaState.READY
        ]
        if ready:
            node, running = self.dice.choice(ready)
            self.world.fault(f"a worker of {node.name} dies")
            node.executor.worker_dies(running)

    def _worker_freezes(self) -> None:
        """A worker is stopped; its node lives, and knows nothing of it."""
        ready = [
            (node, running.assignment.replica)
            for node in self.world.running()
            for running in node.executor.all()
            if running.state is ReplicaState.READY
        ]
        if ready:
            node, replica = self.dice.choice(ready)
            seconds = self.dice.uniform(0.5, 6.0)
            self.world.fault(f"the worker of {replica} is stopped for {seconds:.1f} s")
            node.engine.freeze(replica, seconds)

            def goes_on() -> None:
                self.world.callers.amiss_until = self.world.time.now

            self.world.time.after(seconds, goes_on)

    def _loads_fail(self) -> None:
        share = self.dice.uniform(0.2, 0.8)
        self.world.fault(f"{share:.0%} of loads fail for a while")
        self.world.fails = share

        def well() -> None:
            self.world.fails = 0.0

        self.world.time.after(self.dice.uniform(3.0, 10.0), well)


def _linked(nodes: Sequence[VirtualNode]) -> bool:
    """Whether each that has joined comes to know all others, by way of those that know each other."""
    members = [node for node in nodes if MEMBER + node.id in node.disk.records]
    reached = members[:1]
    for node in reached:
        reached += [each for each in members if each not in reached and _knows(node, each) and _knows(each, node)]
    return len(reached) == len(members)


def _knows(node: VirtualNode, other: VirtualNode) -> bool:
    """On its disk, and not as removed."""
    record = node.disk.records.get(MEMBER + other.id)
    return record is not None and isinstance(record.value, Member) and not record.value.removed
