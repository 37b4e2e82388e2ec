"""How patient and how talkative a node is with its peers.

Law of this file: numbers and their reasons; no behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tars.core.probing import ProbeSettings


@dataclass(frozen=True, slots=True)
class MembershipSettings:
    """Seconds. A dead node is known everywhere after ring probe (at most 1.0), whole probe (0.8), suspicion (1.8 to 2.6), news (0.5)."""

    probing: ProbeSettings = field(default_factory=ProbeSettings)
    shortest_suspicion: float = 1.8
    """With the probe before it 2.6: a node whose loop stands still for 2 s refutes in time."""
    longest_suspicion: float = 2.6
    confirmations: int = 3
    """Further accusers that make a suspicion shortest (Lifeguard)."""
    hearsay: float = 1.5
    """How many times longer a suspicion lasts where it was only heard of: the accuser's word or the refutation comes before."""
    isolation: float = 3.0
    """How many times longer suspicions last while nobody at all is heard."""
    retry: float = 2.0
    """Between two tries to find a dead peer or a seed again."""
    retries_for_each: int = 4
    """So many of all live nodes try one dead peer in each `retry`, however many they are."""
    compare: float = 2.0
    """Between two comparisons of whom this node and another hold for gone."""
    updates: int = 12
    """News about others in one envelope, about 1 KiB."""
    farewells: int = 64
    """Peers that a leaving node tells itself."""

    @staticmethod
    def paced(probe_seconds: float) -> MembershipSettings:
        """The defaults, faster or slower as a whole; 0.5 gives the defaults themselves."""
        factor, usual = probe_seconds / 0.5, MembershipSettings()
        probing = replace(
            usual.probing,
            interval=probe_seconds,
            direct=usual.probing.direct * factor,
            whole=usual.probing.whole * factor,
            patience=usual.probing.patience * factor,
        )
        return replace(
            usual,
            probing=probing,
            shortest_suspicion=usual.shortest_suspicion * factor,
            longest_suspicion=usual.longest_suspicion * factor,
            retry=usual.retry * factor,
            compare=usual.compare * factor,
        )
