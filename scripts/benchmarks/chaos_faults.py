"""The faults of `scripts/bench chaos`: which ones, in which order, and whom one may strike.

Law of this file: pure. The same seed gives the same faults; whom each one strikes depends on who can be struck then, so that at least one
live replica of each model, on a PC that nothing is wrong with, and one gateway remain at all times.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class FaultKind(StrEnum):
    """What is done."""

    KILL = "node killed"
    FREEZE = "PC frozen"
    WORKER_KILL = "worker killed"
    WORKER_FREEZE = "worker frozen"
    CUT = "cable pulled"
    SWALLOW = "packets swallowed"
    COORDINATOR = "coordinator killed"
    ROLLING = "rolling restart"
    OVERLOAD = "5x overload"

    @property
    def needs_links(self) -> bool:
        """Whether it can only be done to PCs on a network of their own."""
        return self in (FaultKind.CUT, FaultKind.SWALLOW)

    @property
    def strikes_worker(self) -> bool:
        """One replica, on a node that lives on."""
        return self in (FaultKind.WORKER_KILL, FaultKind.WORKER_FREEZE)

    @property
    def strikes_node(self) -> bool:
        """A whole PC, or all of its process."""
        return not self.strikes_worker and self not in (FaultKind.ROLLING, FaultKind.OVERLOAD)


HOLD_SECONDS: Mapping[FaultKind, tuple[float, float]] = {
    FaultKind.KILL: (0.2, 3.0),
    FaultKind.FREEZE: (3.0, 12.0),
    FaultKind.WORKER_KILL: (0.0, 0.0),
    FaultKind.WORKER_FREEZE: (3.0, 12.0),
    FaultKind.CUT: (3.0, 12.0),
    FaultKind.SWALLOW: (3.0, 12.0),
    FaultKind.COORDINATOR: (0.2, 8.0),
    FaultKind.ROLLING: (0.0, 0.5),
    FaultKind.OVERLOAD: (5.0, 8.0),
}
"""How long it lasts: below the mesh's 5 s until a silent PC counts as dead, and above."""
RARE = {FaultKind.ROLLING: 0.4, FaultKind.OVERLOAD: 0.4}
"""Of the others' share: a rolling restart is three restarts, an overload hundreds of calls."""
TOGETHER_SHARE = 0.25
"""Faults that do not wait until the one before them is mended."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One to come. `draw`, 0 to 1, picks its victim; `together`: also while the one before it is not mended."""

    number: int
    kind: FaultKind
    draw: float
    hold: float
    together: bool


def schedule(seed: int, count: int, *, links: bool, only: Collection[FaultKind] | None = None) -> list[Fault]:
    """`count` faults, every kind about as often as the others in any stretch of them. Raises ValueError where none of `only` can be."""
    draw = random.Random(f"faults {seed}")
    kinds = [kind for kind in FaultKind if (only is None or kind in only) and (links or not kind.needs_links)]
    if not kinds:
        raise ValueError("none of these faults can be done on loopback: cables need networks of their own")
    faults: list[Fault] = []
    bag: list[FaultKind] = []
    while len(faults) < count:
        if not bag:
            bag = [kind for kind in kinds if only is not None or draw.random() < RARE.get(kind, 1.0)]
            draw.shuffle(bag)
            continue
        kind = bag.pop()
        together = draw.random() < TOGETHER_SHARE
        faults.append(Fault(len(faults), kind, draw.random(), draw.uniform(*HOLD_SECONDS[kind]), together))
    return faults


@dataclass(frozen=True, slots=True)
class NodeView:
    """What the nemesis knows of a PC. `healthy`: no fault is in force there; `ready`: models that it serves."""

    name: str
    healthy: bool
    gateway: bool
    coordinates: bool = False
    ready: frozenset[str] = frozenset()


def victims(kind: FaultKind, nodes: Sequence[NodeView], models: Sequence[str]) -> list[tuple[str, str | None]]:
    """(node, model of the replica or None) that the fault may strike now; empty: it has to wait."""
    found: list[tuple[str, str | None]] = []
    for node in nodes:
        others = [other for other in nodes if other is not node and other.healthy]
        if not node.healthy:
            continue
        if kind.strikes_worker:
            found += [
                (node.name, model)
                for model in sorted(node.ready)
                if any(model in other.ready for other in others)
            ]  # fmt: skip
            continue
        if kind is FaultKind.COORDINATOR and not node.coordinates:
            continue
        served = all(any(model in other.ready for other in others) for model in models)
        if served and any(other.gateway for other in others):
            found.append((node.name, None))
    if kind is FaultKind.OVERLOAD:
        return [("all", None)] if all(node.healthy for node in nodes) else []
    if kind is FaultKind.ROLLING:
        # Each in its turn is asked again; at the start all must be well.
        return [("all", None)] if len(found) == len(nodes) else []
    return found


def chosen(fault: Fault, possible: Sequence[tuple[str, str | None]]) -> tuple[str, str | None]:
    """The one that its draw picks."""
    return possible[min(int(fault.draw * len(possible)), len(possible) - 1)]


@dataclass(slots=True)
class FaultRecord:
    """One that struck. Times are seconds on the monotonic clock; None: it was not seen."""

    number: int
    kind: FaultKind
    node: str
    model: str | None
    struck: float
    over: float | None = None
    """It was taken back, or the process started again."""
    detected: float | None = None
    """A living node said that the victim is not well."""
    mended: float | None = None
    """Every replica that is wanted was ready again."""
    problems: list[str] = field(default_factory=list)

    def in_force(self, at: float, node: str, margin: float = 0.0) -> bool:
        """Whether it explains that `node` was not there."""
        if not (self.kind.strikes_node or self.kind is FaultKind.ROLLING):
            return False
        ends = self.mended if self.mended is not None else self.over
        return self.node in (node, "all") and self.struck <= at <= (ends if ends is not None else at) + margin
