"""Whether a replica, or a whole node, may be given calls after it failed: the circuit breaker.

Law of this file: pure; time comes as an argument, on one monotonic clock. Source of the three states: Nygard, "Release It!" (2007), chapter
5. A breaker here never forbids: a replica whose breaker is open is asked after all others, and where there is no other it is asked.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

COOLDOWN_MOST_SECONDS = 30.0
"""However often it failed in a row, it is tried again after this; membership has long had its say by then."""
JITTER_PART = 0.1
"""A cooldown is up to this part longer, so that the nodes of a mesh do not all try the one that came back in the same moment."""
PROBE_MOST_SECONDS = 30.0
"""A try of which nothing was heard for so long stands in nobody's way any more."""


class BreakerState(StrEnum):
    """CLOSED: calls as usual. OPEN: it failed a moment ago, others are asked first. HALF_OPEN: one call at a time may find out."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Uniform(Protocol):
    """The randomness that is passed in; `random.Random` is one."""

    def random(self) -> float:
        """In [0, 1)."""


class Breaker:
    """One replica's, or one node's. `rng` spreads cooldowns; without it they are exact."""

    __slots__ = ("_failures", "_probing_since", "_rng", "_until", "by_lateness")

    def __init__(self, rng: Uniform | None = None):
        self._rng = rng
        self._failures = 0
        """In a row; 0 is closed."""
        self._until = float("-inf")
        self._probing_since: float | None = None
        self.by_lateness = False
        """Nothing but silence opened it, so that any sign of life closes it."""

    @property
    def failures(self) -> int:
        """How often it opened since the last success."""
        return self._failures

    def state(self, now: float) -> BreakerState:
        """See `BreakerState`."""
        if not self._failures:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._until else BreakerState.HALF_OPEN

    def cooldown(self, now: float) -> float:
        """Seconds until it is half-open; 0 where it is not open."""
        return max(0.0, self._until - now) if self._failures else 0.0

    def may_try(self, now: float) -> bool:
        """Whether a call may go there as if nothing had happened: closed, or half-open and nobody is trying it."""
        match self.state(now):
            case BreakerState.CLOSED:
                return True
            case BreakerState.OPEN:
                return False
            case _:
                return self._probing_since is None or now - self._probing_since >= PROBE_MOST_SECONDS

    def tried(self, now: float) -> None:
        """A call goes there now. While it is half-open no second one `may_try` until this one succeeded, failed or was given up."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self._probing_since = now

    def gave_up(self) -> None:
        """The call that tried it ended and showed nothing (its caller left, say)."""
        self._probing_since = None

    def succeeded(self) -> None:
        """It showed that it works: closed, and all is forgiven."""
        self._failures = 0
        self._until = float("-inf")
        self._probing_since = None

    def failed(self, seconds: float, now: float, *, late: bool = False) -> None:
        """A call failed there: open for `seconds`, twice as long for each time in a row, at most `COOLDOWN_MOST_SECONDS`.

        Failures while it is open count as the one that opened it: ten calls that break in one moment are one failure of the replica.
        `late`: it did not answer in time, and that is all.
        """
        self.by_lateness = late and (self.by_lateness or not self._failures)
        if self.state(now) is not BreakerState.OPEN:
            self._failures += 1
        length = seconds * 2.0 ** min(self._failures - 1, 10)
        if self._rng is not None:
            length *= 1 + JITTER_PART * self._rng.random()
        self._until = max(self._until, now + min(COOLDOWN_MOST_SECONDS, length))
        self._probing_since = None
