"""Who is there. SWIM (Das, Gupta, Motivala, 2002) with Lifeguard (Dadgar, Phillips, Currey, 2017)."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Dice(Protocol):
    """The randomness that is passed in; `random.Random` is one."""

    def random(self) -> float:
        """In [0, 1)."""

    def randrange(self, stop: int, /) -> int:
        """In [0, stop)."""

    def sample(self, population: Sequence[T], k: int, /) -> list[T]:
        """`k` different elements."""

    def shuffle(self, x: MutableSequence[Any], /) -> None:
        """In place."""


@dataclass(frozen=True, slots=True)
class MembershipSettings:
    """Seconds."""

    probe_interval: float = 0.5
