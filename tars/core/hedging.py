"""How much work may be done twice on purpose, and how long to wait between tries.

Law of this file: pure. Hedging is Dean and Barroso's ("The Tail at Scale", CACM 2013): a second replica is asked once the first takes
longer than 95 of 100 answers do. Full jitter is Brooker's ("Exponential Backoff And Jitter", AWS, 2015).
"""

from __future__ import annotations

from tars.core.health import Uniform

EXTRA_PART = 0.05
"""Units of extra work for each unit that was answered."""
MOST_SAVED_UNITS = 4096.0
"""Units that may be saved up: two of the largest embedding calls. A quiet day does not allow a wasteful minute."""
BACKOFF_SECONDS, BACKOFF_MOST_SECONDS = 0.05, 2.0
"""At most before the first further try, doubled with each; and before any."""


class HedgeBudget:
    """Units of work (texts) that may be given out twice: never more than `EXTRA_PART` of what was answered."""

    def __init__(self) -> None:
        self._saved = 0.0
        self.extra_units = 0.0
        """Given out twice since the start."""

    @property
    def saved(self) -> float:
        """Units that may be given out twice now."""
        return self._saved

    def answered(self, units: float) -> None:
        """A call of `units` was answered (once, however many were asked)."""
        self._saved = min(MOST_SAVED_UNITS, self._saved + EXTRA_PART * units)

    def may_hedge(self, units: float) -> bool:
        """Whether a call of `units` may be given to a second replica; `take` them then."""
        return units <= self._saved

    def take(self, units: float) -> None:
        """A call of `units` is given to a second replica."""
        self._saved -= units
        self.extra_units += units


def full_jitter(attempt: int, rng: Uniform) -> float:
    """Seconds to wait before try number `attempt` + 1 (from 0): anything between nothing and the doubled, capped backoff."""
    return rng.random() * min(BACKOFF_MOST_SECONDS, BACKOFF_SECONDS * 2.0 ** min(attempt, 30))
