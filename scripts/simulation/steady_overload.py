"""Steady overload: a small mesh that is well, and for a while several times as many calls as it can answer.

Law of this file: all of it from the seed's own dice, and nothing goes wrong but that there is too much to do. What must hold: no call is
tried so often that trying is the load, what is answered stays what can be answered, and nobody hears of anything but too much work.
"""

from __future__ import annotations

import random

from breach import Breach
from virtual_engine import PREFILL_SECONDS, STEP_SECONDS
from world import World

from tars.core.records import Wish
from tars.core.replicated_map import DEPLOYMENT
from tars.core.retry_budget import SHARE
from tars.core.types import Deployment, ModelKind, ReplicaState

MODEL = "qwen-0.5b"
LENGTH = 6
READY_SECONDS = 30.0
PATIENCE_SECONDS = 4.0
LASTS_SECONDS = 4.0
TIMES_CAPACITY = (2.0, 5.0)
LEAST_PART = 0.8
"""Of what the replicas could answer in the time."""


class Overload:
    """Two PCs (or three) with a replica each."""

    def __init__(self, world: World):
        self.world = world
        self.dice = random.Random(f"{world.seed}/overload")
        self.times = self.dice.uniform(*TIMES_CAPACITY)
        first = world.new_node_with_card()
        first.found()
        count = self.dice.choice((2, 2, 3))
        for number in range(1, count):
            node = world.new_node_with_card()
            world.time.at(0.5 * number, lambda node=node: node.join(first))  # type: ignore[misc]
        world.time.run_until(3.0)
        first.write(DEPLOYMENT + MODEL, Wish(Deployment(MODEL, replicas=count)))
        while len(slots := self._slots()) < count:
            if world.time.now > READY_SECONDS:
                raise Breach(f"{MODEL} has {len(slots)} of {count} replicas after {READY_SECONDS:.0f} s")
            world.time.run_until(world.time.now + 1.0)
        world.time.run_until(world.time.now + 2.0)  # everybody has heard of them
        self.capacity = sum(slots) / (PREFILL_SECONDS + LENGTH / 1.5 * STEP_SECONDS)
        """Calls a second, about: a step gives one and a half tokens."""

    def run(self) -> None:
        """All calls, and what became of them."""
        world, tally = self.world, self.world.callers.tally
        rate = self.times * self.capacity
        world.log("***", "%.0f calls a second come, %.0f can be answered", rate, self.capacity)
        when = world.time.now
        end = when + LASTS_SECONDS
        while (when := when + self.dice.expovariate(rate)) < end:
            world.time.at(when, self._call)
        for node in world.nodes:
            # As after an hour of it: what the budget gives at the start is spent.
            while node.gateway.state.retries.may_retry():
                pass
        world.time.run_until(end + PATIENCE_SECONDS + 1.0)
        if tally.attempts > (1 + SHARE) * tally.calls:
            raise Breach(f"{tally.calls} calls made {tally.attempts} attempts: a retry storm")
        if tally.failed:
            raise Breach(f"{tally.failed} of {tally.sent} calls failed, and there was only too much to do")
        if tally.answered < LEAST_PART * self.capacity * LASTS_SECONDS:
            raise Breach(
                f"{tally.answered} of {tally.sent} calls were answered, where {self.capacity * LASTS_SECONDS:.0f} could be"
            )

    def _call(self) -> None:
        self.world.callers.call(MODEL, ModelKind.CHAT, length=LENGTH, patience=PATIENCE_SECONDS)

    def _slots(self) -> list[int]:
        return [
            each.assignment.settings.slots
            for node in self.world.running()
            for each in node.executor.all()
            if each.state is ReplicaState.READY
        ]
