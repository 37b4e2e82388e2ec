"""How long a new call would wait for a replica, from how fast the replica works off what it is given.

Law of this file: pure; time comes as an argument, on one monotonic clock.

The rate is measured while the replica is saturated only. A call that ends brings its units, and its share of the seconds: while k calls
ran together, each of them had one k-th of the time. So nothing is counted before its seconds are, and a replica whose answers take long
does not look slow until the first one ended. Until something was measured the replica's own word counts, as if it had worked off
`OWN_WORD_UNITS` at that speed; what is older than about `HORIZON_SECONDS` of saturation fades.

    wait  =  (units that are served before it  +  units left of what runs / calls that run)  /  rate

The second term is the mean time until one of the running calls ends: exact for calls that share the replica evenly and have as much left as
each other, and for exponential lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HORIZON_SECONDS = 20.0
"""Of saturation: some ten answers each of all slots; a game that is started on the PC shows within it."""
OWN_WORD_UNITS = 128.0
"""The weight of what the replica said of itself: one answer is enough to correct it. Units and not seconds, because it is mostly too much
(it was measured alone, on an idle PC, without what a call costs beside its tokens), and so it weighs the less the more it is wrong."""
MOST_RATIO = 10.0
"""One answer that took longer than this says no more than one that took this long."""
LEAST_SECONDS = 0.25
"""Without any word of the replica nothing is predicted before so much saturation was seen."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a call keeps from when it began, for `ServiceRate.ended`."""

    at: float
    saturated: float
    shares: float


class ServiceRate:
    """Units a second of a saturated replica, all its calls together."""

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0
        self._own_word = OWN_WORD_UNITS
        self._running = 0
        self._saturated = False
        self._at = 0.0
        self._saturated_seconds = 0.0
        self._shares = 0.0
        """The integral of 1 / running over the saturated time."""

    def note(self, running: int, saturated: bool, now: float) -> None:
        """From now on `running` calls run, and the replica has all that it can take, or not."""
        self._pass(now)
        self._running = running
        self._saturated = saturated

    def started(self, now: float) -> Start:
        """A call begins."""
        self._pass(now)
        return Start(now, self._saturated_seconds, self._shares)

    def ended(self, start: Start, units: float, now: float) -> None:
        """It ended, and cost `units`."""
        self._pass(now)
        saturated, elapsed = self._saturated_seconds - start.saturated, now - start.at
        if saturated <= 0 or elapsed <= 0 or units <= 0:
            return
        seconds = self._shares - start.shares
        fade = math.exp(-seconds / HORIZON_SECONDS)
        self._units = self._units * fade + units * min(1.0, saturated / elapsed)
        self._seconds = self._seconds * fade + seconds
        self._own_word *= fade

    def per_second(self, own_word: float | None) -> float | None:
        """Units a second; None where nothing is known yet. `own_word`: what the replica measured of itself."""
        if own_word is not None and own_word > 0:
            return (self._units + self._own_word) / (self._seconds + self._own_word / own_word)
        return self._units / self._seconds if self._seconds >= LEAST_SECONDS else None

    def _pass(self, now: float) -> None:
        if self._saturated and now > self._at:
            self._saturated_seconds += now - self._at
            self._shares += (now - self._at) / max(1, self._running)
        self._at = now


def units_ahead(before: float, running_units: float, running: int) -> float:
    """Units that are worked off until a new call is begun; see the module's law."""
    return before + (running_units / running if running else 0.0)


def seconds_of(units: float, rate: float | None) -> float:
    """How long so much takes; 0 where no rate is known."""
    return units / rate if rate else 0.0


class Margin:
    """How much longer than expected things take: the mean ratio and four times its mean deviation, as TCP reckons its time-outs (RFC 6298).

    In a lasting overload every call that is let in begins as late as it may, so a margin of the mean alone would let half of them end late.
    """

    def __init__(self) -> None:
        self._mean = 1.0
        self._deviation = 0.25

    @property
    def mean(self) -> float:
        """Times what was expected: half take no longer."""
        return self._mean

    @property
    def most(self) -> float:
        """Times what was expected: nearly all take no longer."""
        return self._mean + 4 * self._deviation

    def saw(self, expected: float, took: float, whole: bool = True) -> None:
        """Something took so many seconds; not `whole`: at least so many, for it was broken off."""
        if expected <= 0:
            return
        ratio = min(MOST_RATIO, took / expected)
        if whole or ratio > self._mean:
            # Half of TCP's gains: answers differ more from each other than round trips.
            self._deviation += (abs(ratio - self._mean) - self._deviation) / 8
            self._mean += (ratio - self._mean) / 16


def latest_start(remaining: float, own_seconds: float) -> float:
    """In how many seconds a call with `remaining` seconds of budget must be begun to be worth it.

    `own_seconds` are kept for the answer, but at most half of the budget: how long an answer gets is a guess, and a call that asks for
    more than its time allows is not refused for a queue that is short.
    """
    return remaining - min(own_seconds, remaining / 2)
