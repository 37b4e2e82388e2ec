"""How many of a node's attempts may be further ones: no retry storm, however much of the mesh is ill.

Law of this file: pure. A token bucket over all calls of a node: each call puts in a part of a token, each retry, hedge or continuation
takes a whole one. In the long run there are at most `1 + SHARE` attempts for each call. Sources: Envoy's retry budgets; Finagle's
`RetryBudget`, which also gives 20 %.
"""

from __future__ import annotations

SHARE = 0.2
"""Further attempts for each call, in the long run."""
MOST_SAVED = 100.0
"""A node's death breaks as many calls as it served in one moment; more than this at once is no single death."""
AT_START = 10.0
"""So that a node's first calls find their way, too."""


class RetryBudget:
    """One per node; see the module's law."""

    def __init__(self) -> None:
        self._saved = AT_START
        self.taken = 0
        """Further attempts that were allowed since the start."""
        self.refused = 0
        """Further attempts that were not allowed."""

    @property
    def saved(self) -> float:
        """Further attempts that may be made now."""
        return self._saved

    def call(self) -> None:
        """A call came from a caller (not from a peer: that call is in its gateway's budget)."""
        self._saved = min(MOST_SAVED, self._saved + SHARE)

    def may_retry(self) -> bool:
        """Whether one more attempt may be made; takes it."""
        # A hair less than one: five fifths are not one in floating point.
        if self._saved < 1 - 1e-9:
            self.refused += 1
            return False
        self._saved = max(0.0, self._saved - 1)
        self.taken += 1
        return True
