"""What all calls of one node share: what was learned of the replicas, and how much may be tried once more.

Law of this file: the parts have their laws; this only holds them together, so that one node has one of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tars.core.health import Uniform
from tars.core.hedging import HedgeBudget
from tars.core.learned_deadlines import LearnedDeadlines
from tars.core.replica_ledger import ReplicaLedger
from tars.core.retry_budget import RetryBudget


@dataclass(slots=True, eq=False)
class RoutingState:
    """One per node; see the module's law."""

    ledger: ReplicaLedger = field(default_factory=ReplicaLedger)
    deadlines: LearnedDeadlines = field(default_factory=LearnedDeadlines)
    retries: RetryBudget = field(default_factory=RetryBudget)
    hedges: HedgeBudget = field(default_factory=HedgeBudget)

    @classmethod
    def with_dice(cls, rng: Uniform) -> RoutingState:
        """With cooldowns spread by `rng`."""
        return cls(ledger=ReplicaLedger(rng))
