"""The devices of one simulated PC and the replicas on them: every byte is accounted, loads take time and can fail.

Law of this file: it does what orders say, as `tars.mesh.executor` does, and checks at every step what must hold on every device: TARS
alone never takes more than is there, and one load at a time. A breach raises `Breach`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from breach import Breach
from virtual_fleet import MOST_ERROR, content_of
from virtual_time import VirtualTime

from tars.core.node_steps import next_steps
from tars.core.records import ReplicaReport
from tars.core.types import Assignment, Bytes, DeviceId, DeviceSnapshot, ModelKind, ReplicaId, ReplicaState
from tars.workers.lifecycle import BUSY_SECONDS

MOVING = (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING, ReplicaState.STOPPING)
"""A replica in these states has its device's memory in motion."""
LOADING_OR_ENDING = (ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.STOPPING)
COOL_DOWN_SECONDS = 5.0
"""Between a load that failed and the next try of its node, a fraction of the real one."""


@dataclass(slots=True)
class Running:
    """One replica on a device. `bytes` is what it takes there now, `takes` what it will have taken when it is loaded."""

    assignment: Assignment
    kind: ModelKind
    state: ReplicaState
    takes: Bytes
    bytes: Bytes = Bytes(0)
    error: str | None = None
    again_at: float = 0.0
    """When a load that failed is tried again, while it is still ordered."""
    since: int = 0
    """Counts its changes of state, so that what was to happen in an earlier state does not."""
    missing: Bytes = Bytes(0)
    """What it would have needed more, where its last load ran out of memory."""
    unforced: bool = True
    """No foreign program took memory of its device while it loaded."""


@dataclass(slots=True)
class Card:
    """A device as it is bought, and what foreign programs want of it; they get what is free, and more as it becomes free."""

    bought: DeviceSnapshot
    foreign_wanted: int = 0
    foreign: int = 0
    quiet: DeviceSnapshot | None = None
    """As it was before what is in motion began."""
    running: dict[ReplicaId, Running] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Bytes that TARS takes here now."""
        return sum(each.bytes for each in self.running.values())

    @property
    def free(self) -> int:
        return self.bought.memory_total - self.foreign - self.held

    @property
    def moving(self) -> bool:
        return any(each.state in MOVING for each in self.running.values())

    def press(self) -> None:
        """Let foreign programs take what they want, as far as it is free."""
        self.foreign = max(0, min(self.foreign_wanted, self.bought.memory_total - self.held))

    def snapshot(self) -> DeviceSnapshot:
        """As the node tells it: while its memory is in motion, as it was before."""
        if self.moving and self.quiet is not None:
            return self.quiet
        held = sum(each.takes for each in self.running.values() if each.state is ReplicaState.READY)
        free = max(0, self.free)
        if self.quiet is None or (self.quiet.memory_free, self.quiet.memory_held) != (free, held):
            self.quiet = replace(self.bought, memory_free=Bytes(free), memory_held=Bytes(held))
        return self.quiet


@dataclass(slots=True)
class Conditions:
    """How loads go just now; the world changes it."""

    load_seconds: Callable[[Assignment], float]
    stop_seconds: Callable[[], float]
    fails: Callable[[Assignment], str | None]
    """Why this load will fail; None where it will not."""
    takes: Callable[[Assignment, DeviceSnapshot], Bytes]
    kind: Callable[[str], ModelKind]


class VirtualExecutor:
    """`changed` is called when a replica changed; `loaded` when one became ready, before that."""

    def __init__(
        self,
        devices: Sequence[DeviceSnapshot],
        time: VirtualTime,
        conditions: Conditions,
        *,
        changed: Callable[[str], None],
        loaded: Callable[[Running, DeviceSnapshot], None],
    ):
        self.cards = {device.id: Card(device) for device in devices}
        self.activity = 0
        """Loads and unloads that were begun."""
        self._time = time
        self._conditions = conditions
        self._changed = changed
        self._loaded = loaded
        self._down = False

    # --- what others see ----------------------------------------------------------------------------------------------

    def reports(self) -> tuple[ReplicaReport, ...]:
        """As in the node's advert, sorted by replica."""
        found = [running for card in self.cards.values() for running in card.running.values()]
        return tuple(
            ReplicaReport(
                assignment=running.assignment,
                kind=running.kind,
                state=running.state,
                slots=running.assignment.settings.slots,
                taken=running.takes if running.state is ReplicaState.READY else None,
                file_sha256=content_of(running.assignment),
                error=running.error,
            )
            for running in sorted(found, key=lambda running: running.assignment.replica)
        )

    def devices(self) -> tuple[DeviceSnapshot, ...]:
        """As in the node's advert."""
        return tuple(card.snapshot() for card in self.cards.values())

    def short_of_memory(self, running: Running) -> bool:
        """Whether it failed for want of memory that is still not there, tried again just now or not: by its estimate it fits, by what it
        takes it does not.
        """
        free = self.cards[running.assignment.device].free + running.bytes
        failed = running.state in (ReplicaState.FAILED, ReplicaState.LOADING) and running.missing > 0
        return failed and running.takes > free

    def all(self) -> list[Running]:
        return [running for card in self.cards.values() for running in card.running.values()]

    # --- what the node does -------------------------------------------------------------------------------------------

    def obey(self, wanted: Sequence[Assignment]) -> None:
        """The next steps towards `wanted`."""
        held = {
            replica: running
            for card in self.cards.values()
            for replica, running in card.running.items()
            if running.state is not ReplicaState.STOPPING
        }
        steps = next_steps(
            [each for each in wanted if each.device in self.cards],
            {replica: running.assignment for replica, running in held.items()},
            {device for device, card in self.cards.items() if card.moving},
            retry_due=[
                replica
                for replica, running in held.items()
                if running.state is ReplicaState.FAILED and self._time.now >= running.again_at
            ],
        )
        for replica in steps.stop:
            self._stop(held[replica])
        for assignment in steps.start:
            known = held.get(assignment.replica)
            if known is None:
                self._load(self.cards[assignment.device], assignment)
            else:
                self._again(known)

    def stop_all(self) -> None:
        """The node ends: its workers end with it, at once."""
        self._down = True
        for card in self.cards.values():
            card.running.clear()
            card.quiet = None
            card.press()

    def foreign(self, device: DeviceId, wanted: int) -> None:
        """Foreign programs want so much of a device from now on."""
        card = self.cards[device]
        grows = wanted > card.foreign_wanted
        card.foreign_wanted = wanted
        card.press()
        if grows:
            for running in card.running.values():
                running.unforced = False

    def worker_dies(self, running: Running) -> None:
        """A worker process crashed; its supervisor starts it again."""
        card = self.cards[running.assignment.device]
        card.snapshot()  # from now on the device's memory is in motion
        self._set(running, ReplicaState.RESTARTING)
        running.bytes = Bytes(0)
        card.press()
        self._then(running, 1.0, lambda: self._restart(card, running))
        self._changed(f"worker of {running.assignment.replica} died")

    def _restart(self, card: Card, running: Running) -> None:
        """As `workers.lifecycle`: once nothing else loads or ends on the device."""
        if any(each.state in LOADING_OR_ENDING for each in card.running.values()):
            self._then(running, BUSY_SECONDS, lambda: self._restart(card, running))
        else:
            self._begin(card, running)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _load(self, card: Card, assignment: Assignment) -> None:
        card.snapshot()
        kind = self._conditions.kind(assignment.model)
        takes = self._conditions.takes(assignment, card.bought)
        running = Running(assignment, kind, ReplicaState.STARTING, takes)
        others = sum(each.takes for each in card.running.values())
        card.running[assignment.replica] = running
        self.activity += 1
        limit = card.bought.memory_total - card.bought.reserve
        slack = MOST_ERROR * assignment.memory.total
        if others + assignment.memory.total > limit + slack:
            raise Breach(
                f"{assignment.replica} was ordered onto {card.bought.name} where TARS holds {Bytes(others)}: with its "
                f"{assignment.memory.total} that is more than {Bytes(limit)}"
            )
        self._begin(card, running)

    def _begin(self, card: Card, running: Running) -> None:
        if any(each.state is ReplicaState.LOADING for each in card.running.values()):
            raise Breach(
                f"{running.assignment.replica} begins to load on {card.bought.id} while another one loads there"
            )
        self._set(running, ReplicaState.LOADING)
        running.error = None
        running.bytes = Bytes(max(0, min(running.takes, card.free)))
        self._account(card)
        self._then(running, self._conditions.load_seconds(running.assignment), lambda: self._end_load(card, running))
        self._changed(f"loading {running.assignment.replica}, {running.takes}")

    def _end_load(self, card: Card, running: Running) -> None:
        why = self._conditions.fails(running.assignment)
        running.missing = Bytes(max(0, running.takes - running.bytes - max(0, card.free)))
        if why is None and running.missing:
            why = f"out of memory: {running.missing} are missing"
        if why is not None:
            running.bytes = Bytes(0)
            card.press()
            running.error = why
            self._set(running, ReplicaState.FAILED)
            running.again_at = self._time.now + COOL_DOWN_SECONDS
            self._changed(f"load of {running.assignment.replica} failed: {why}")
            self._then(running, COOL_DOWN_SECONDS, lambda: self._changed(f"{running.assignment.replica} may try again"))
            return
        running.bytes = running.takes
        self._account(card)
        self._set(running, ReplicaState.READY)
        self._loaded(running, card.bought)
        self._changed(f"{running.assignment.replica} is ready")

    def _again(self, running: Running) -> None:
        card = self.cards[running.assignment.device]
        card.snapshot()
        if not self.short_of_memory(running):  # that would be no rest that ever comes
            self.activity += 1
        self._begin(card, running)

    def _stop(self, running: Running) -> None:
        card = self.cards[running.assignment.device]
        card.snapshot()
        self.activity += 1
        self._set(running, ReplicaState.STOPPING)

        def gone() -> None:
            del card.running[running.assignment.replica]
            card.press()
            self._changed(f"{running.assignment.replica} is unloaded")

        self._then(running, self._conditions.stop_seconds(), gone)
        self._changed(f"unloading {running.assignment.replica}")

    def _account(self, card: Card) -> None:
        if card.held > card.bought.memory_total:
            raise Breach(f"{card.bought.id} is over-committed: TARS holds {Bytes(card.held)}")

    @staticmethod
    def _set(running: Running, state: ReplicaState) -> None:
        running.state = state
        running.since += 1

    def _then(self, running: Running, seconds: float, action: Callable[[], None]) -> None:
        since = running.since

        def due() -> None:
            if running.since == since and not self._down:
                action()

        self._time.after(seconds, due)
