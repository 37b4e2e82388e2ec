"""Who is served next of those who wait for one replica: fair between callers, interactive work before batch work, and bounded.

Law of this file: pure; no clock. It knows callers, priorities and units of work, and neither calls nor replicas.

Fairness is that of start-time fair queueing (Goyal, Vin, Cheng, 1996), as "Fairness in Serving Large Language Models" (Sheng et al.,
OSDI 2024) uses it for generation: each caller has a counter of the units that it was given, the one with the least is served next, a caller
who was away begins at the counter of the one who was served last (so nobody saves up), and what was charged by prediction is corrected when
it is known (`charge`). Between the two priorities the same rule holds with weights, so that batch work goes on, slowly, however much
interactive work comes.

When the queue is full, who has the most in it makes room for who has less (longest queue drop): a greedy caller's flood costs that caller's
own calls, and batch work goes before interactive work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

Priority = Literal["interactive", "batch"]
"""How urgent a call is, by its caller's own word."""
INTERACTIVE: Final = "interactive"
BATCH: Final = "batch"

WEIGHTS: Mapping[Priority, float] = MappingProxyType({INTERACTIVE: 9.0, BATCH: 1.0})
"""While both wait, one unit in ten goes to batch work: it ends, and a person hardly notices."""
MOST_IDLE_CALLERS = 1024
"""Callers without waiting work whose counters are kept: those who are ahead of the others. API keys are few."""


@dataclass(slots=True, eq=False)
class Entry:
    """A piece of work that waits. `units`: what it is expected to cost."""

    caller: str
    priority: Priority
    units: float


@dataclass(slots=True, eq=False)
class _Caller:
    """One caller's line within a priority."""

    name: str
    counter: float
    line: deque[Entry] = field(default_factory=deque)
    units: float = 0.0
    """Of the line."""


class _Class:
    """One priority's callers. `counter` counts the class's own units over its weight; `clock` is its callers' counter when it was served
    last.
    """

    __slots__ = ("callers", "clock", "counter", "idle", "waiting", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.counter = 0.0
        self.clock = 0.0
        self.callers: dict[str, _Caller] = {}
        """Those with waiting work."""
        self.idle: dict[str, float] = {}
        """Counters of those without, who were given more than the others."""
        self.waiting = 0

    def counter_of(self, name: str) -> float:
        """A caller's, as it would begin now."""
        caller = self.callers.get(name)
        return max(self.clock, self.idle.get(name, self.clock)) if caller is None else caller.counter

    def first(self) -> _Caller:
        """Whose turn it is; of equal ones the one who came first."""
        return min(self.callers.values(), key=lambda caller: caller.counter)

    def rest(self, caller: _Caller) -> None:
        """Nothing of it waits any more."""
        del self.callers[caller.name]
        self._remember(caller.name, caller.counter)

    def charge(self, name: str, units: float) -> None:
        caller = self.callers.get(name)
        if caller is None:
            self._remember(name, self.counter_of(name) + units)
        else:
            caller.counter += units

    def _remember(self, name: str, counter: float) -> None:
        # Who is not ahead of the others begins where they are: there is nothing to remember.
        if counter > self.clock:
            self.idle[name] = counter
        else:
            self.idle.pop(name, None)
        if len(self.idle) > MOST_IDLE_CALLERS:
            self.idle = {each: at for each, at in self.idle.items() if at > self.clock}
            while len(self.idle) > MOST_IDLE_CALLERS:
                del self.idle[min(self.idle, key=self.idle.__getitem__)]


class FairQueue:
    """At most `most` entries; see the module's law."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._classes = {priority: _Class(weight) for priority, weight in WEIGHTS.items()}
        self._clock = 0.0
        """The counter of the class that was served last."""
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Entry]:
        """All that waits, in no particular order."""
        for kind in self._classes.values():
            for caller in kind.callers.values():
                yield from caller.line

    def waiting(self, priority: Priority) -> int:
        """Entries of one priority."""
        return self._classes[priority].waiting

    def units_before(self, caller: str, priority: Priority) -> float:
        """Units of what waits that would be served before a new entry of `caller`, if nobody else came: a fluid approximation, in which a
        turn has no length of its own."""
        own = self._classes[priority]
        line = own.callers.get(caller)
        own_units = 0.0 if line is None else line.units
        start = own.counter_of(caller) + own_units
        before = own_units
        for other in own.callers.values():
            if other is not line:
                before += min(other.units, max(0.0, start - other.counter))
        counter = self._counter(own) + before / own.weight
        for kind in self._classes.values():
            if kind is not own and kind.waiting:
                units = sum(each.units for each in kind.callers.values())
                before += min(units, max(0.0, counter - kind.counter) * kind.weight)
        return before

    def add(self, entry: Entry) -> Entry | None:
        """Let it wait. Who has to go for it, where the queue is full: None, the newest entry of another caller, or `entry` itself."""
        kind = self._classes[entry.priority]
        gone: Entry | None = None
        if self._waiting >= self.most:
            gone = self._victim(entry)
            if gone is entry:
                return entry
            self.remove(gone)
        caller = kind.callers.get(entry.caller)
        if caller is None:
            caller = _Caller(entry.caller, kind.counter_of(entry.caller))
            kind.idle.pop(entry.caller, None)
            if not kind.waiting:
                kind.counter = self._counter(kind)
            kind.callers[entry.caller] = caller
        caller.line.append(entry)
        caller.units += entry.units
        kind.waiting += 1
        self._waiting += 1
        return gone

    def first(self) -> Entry | None:
        """Whose turn it is; None where nobody waits."""
        kind = self._first_class()
        return None if kind is None else kind.first().line[0]

    def take(self) -> Entry:
        """The first, charged with its units. Raises `IndexError` where nobody waits."""
        kind = self._first_class()
        if kind is None:
            raise IndexError("nobody waits")
        caller = kind.first()
        entry = caller.line.popleft()
        kind.clock = max(kind.clock, caller.counter)
        self._clock = max(self._clock, kind.counter)
        caller.counter += entry.units
        kind.counter += entry.units / kind.weight
        self._taken_out(kind, caller, entry)
        return entry

    def pass_by(self, entry: Entry) -> None:
        """It is served at once, for nobody waits: it is charged as if it had waited."""
        kind = self._classes[entry.priority]
        kind.clock = kind.counter_of(entry.caller)
        kind.counter = self._clock = self._counter(kind)
        kind.counter += entry.units / kind.weight
        kind.charge(entry.caller, entry.units)

    def remove(self, entry: Entry) -> bool:
        """It does not wait any longer; False where it did not wait."""
        kind = self._classes[entry.priority]
        caller = kind.callers.get(entry.caller)
        if caller is None or entry not in caller.line:
            return False
        caller.line.remove(entry)
        self._taken_out(kind, caller, entry)
        return True

    def charge(self, caller: str, priority: Priority, units: float) -> None:
        """What was taken cost so much more (less, where negative) than it was expected to."""
        kind = self._classes[priority]
        kind.charge(caller, units)
        kind.counter += units / kind.weight

    # --- inside ------------------------------------------------------------------------------------------------------

    def _counter(self, kind: _Class) -> float:
        """A class's counter, as it would begin now where nothing of it waits."""
        return kind.counter if kind.waiting else max(kind.counter, self._clock)

    def _first_class(self) -> _Class | None:
        # By when its first entry would end, as in weighted fair queueing: batch work that just came does not go first because it had
        # nothing yet. Interactive stands first in `WEIGHTS`, and of equal ones `min` takes the first.
        waiting = [each for each in self._classes.values() if each.waiting]
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        return min(waiting, key=lambda each: each.counter + each.first().line[0].units / each.weight)

    def _victim(self, entry: Entry) -> Entry:
        batch = self._classes[BATCH]
        if entry.priority is INTERACTIVE and batch.waiting:
            return _longest(batch).line[-1]
        own = self._classes[entry.priority]
        if not own.waiting:
            return entry
        longest = _longest(own)
        line = own.callers.get(entry.caller)
        fewer = 1 if line is None else len(line.line) + 1
        return longest.line[-1] if len(longest.line) > fewer else entry

    def _taken_out(self, kind: _Class, caller: _Caller, entry: Entry) -> None:
        kind.waiting -= 1
        self._waiting -= 1
        if caller.line:
            caller.units -= entry.units
        else:
            caller.units = 0.0  # sums of floats drift: with nothing waiting it is nothing
            kind.rest(caller)


def _longest(kind: _Class) -> _Caller:
    return max(kind.callers.values(), key=lambda caller: len(caller.line))
