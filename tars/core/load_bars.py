"""Loads that failed, and for how long each is not tried again on that device.

Law of this file: pure; the time is told. A bar is forgotten when the load succeeds, when the node's file changes, or when somebody
deploys the model again; and with the coordinator that remembers it, which costs one more try.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tars.core.placement_wants import Load
from tars.core.records import HeldFile, NodeAdvert, ReplicaReport
from tars.core.types import ReplicaId, ReplicaState


@dataclass(slots=True)
class _Bar:
    failed_at: float
    pause: float
    error: str
    file: HeldFile | None
    failing: bool
    """Still the same failure: it was reported the last time, too."""
    beside: frozenset[ReplicaId]
    """Replicas of the same load that were ready there already: they do not tell that it can be loaded once more."""

    @property
    def until(self) -> float:
        return self.failed_at + self.pause


class LoadBars:
    """See the module's law. `first` and `most`: seconds of the first pause, which doubles, and of the longest."""

    def __init__(self, first: float, most: float):
        self._first = first
        self._most = most
        self._bars: dict[Load, _Bar] = {}

    def note(self, adverts: Iterable[NodeAdvert], now: float) -> None:
        """Take in what the nodes report: failures bar, successes and new files free."""
        seen: set[Load] = set()
        adverts = tuple(adverts)
        ready: dict[Load, set[ReplicaId]] = {}
        for advert in adverts:
            for report in advert.replicas:
                if report.state is ReplicaState.READY:
                    ready.setdefault(load_of(report), set()).add(report.assignment.replica)
        for load, replicas in ready.items():
            known = self._bars.get(load)
            if known is not None and replicas - known.beside:
                del self._bars[load]
        for advert in adverts:
            files = {(file.model, file.variant): file for file in advert.files}
            for report in advert.replicas:
                load = load_of(report)
                if report.state is ReplicaState.FAILED:
                    seen.add(load)
                    file, beside = files.get(load[:2]), frozenset(ready.get(load, ()))
                    self._failed(load, report.error or "it gave no reason", file, beside, now)
            devices = {device.id for device in advert.node.devices}
            for load, bar in list(self._bars.items()):
                file = files.get(load[:2])
                if load[2] in devices and file is not None and bar.file is not None and not _same(file, bar.file):
                    del self._bars[load]
        for load, bar in self._bars.items():
            bar.failing = load in seen

    def _failed(self, load: Load, error: str, file: HeldFile | None, beside: frozenset[ReplicaId], now: float) -> None:
        known = self._bars.get(load)
        if known is not None and known.failing:
            return
        pause = self._first if known is None else min(self._most, 2 * known.pause)
        self._bars[load] = _Bar(now, pause, error, file, True, beside)

    def forget(self, model: str) -> None:
        """Somebody wants it tried again."""
        for load in [load for load in self._bars if load[0] == model]:
            del self._bars[load]

    def in_force(self, now: float) -> Mapping[Load, str]:
        """Each with its reason, for the verdicts."""
        return {load: _why(load, bar) for load, bar in self._bars.items() if now < bar.until}

    def failed_within(self, seconds: float, now: float) -> Mapping[Load, str]:
        """Those that failed so lately, in force or not: for what may be loaded there and need not be."""
        return {load: _why(load, bar) for load, bar in self._bars.items() if now < bar.failed_at + seconds}

    def next_end(self, now: float) -> float | None:
        """When the next of them ends."""
        return min((bar.until for bar in self._bars.values() if bar.until > now), default=None)

    def next_forgiven(self, seconds: float, now: float) -> float | None:
        """When the next of `failed_within` is no longer one of them."""
        ends = (bar.failed_at + seconds for bar in self._bars.values())
        return min((end for end in ends if end > now), default=None)


def load_of(report: ReplicaReport) -> Load:
    """What a report is about, whichever number the replica has."""
    return (report.assignment.model, report.assignment.variant, report.assignment.device)


def _why(load: Load, bar: _Bar) -> str:
    return f"a load of {load[1]} failed: {bar.error.rstrip('.')}"


def _same(one: HeldFile, other: HeldFile) -> bool:
    if one.size != other.size:
        return False
    return one.sha256 is None or other.sha256 is None or one.sha256 == other.sha256
