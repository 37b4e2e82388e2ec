"""What a call has behind it: the tokens that its caller has, who failed since the last new one, and how many workers died under it.

Law of this file: pure bookkeeping of one call; what follows from it is `call_machine`'s. New tokens forgive: a long answer may meet any
number of breaks as long as it gets on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tars.core.call_effects import Failure, Tokens
from tars.core.retry_rules import MOST_KILLS, MOST_KILLS_HERE, may_have_killed
from tars.core.routing import Candidate
from tars.core.types import ReplicaId


class CallProgress:
    """Of one call with `answers` answers; `exact`: what an exact replica began, only exact ones may go on with."""

    __slots__ = ("_exact", "_file", "_kills", "_kills_here", "_said", "_so_far", "_source", "rounds", "tried")

    def __init__(self, answers: int = 1, exact: bool = False, file: str | None = None):
        self.tried: dict[ReplicaId, float] = {}
        """Those that failed since the last new token, and the time before which they are not asked again."""
        self._said: dict[ReplicaId, Failure] = {}
        """What each of them failed with last."""
        self.rounds = 0
        """How often everybody was tried since the last new token."""
        self._so_far: list[list[int]] = [[] for _ in range(answers)]
        self._exact = exact
        self._file = file
        self._source: Candidate | None = None
        """Who gave the first token: only its like may go on."""
        self._kills = self._kills_here = 0

    @property
    def begun(self) -> bool:
        """Whether the caller has tokens."""
        return self._source is not None

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """The token ids of each answer."""
        return tuple(tuple(answer) for answer in self._so_far)

    def gave(self, candidate: Candidate, index: int, ids: Sequence[int]) -> None:
        """A replica gave these tokens of answer `index`; there is at least one."""
        self._so_far[index] += ids
        if self._source is None:
            self._source = candidate

    def able(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those that could take the call as far as it is: the same file, once there are tokens."""
        source = self._source
        if source is None:
            return [each for each in candidates if each.file_sha256 == self._file] if self._file else candidates
        return [
            each
            for each in candidates
            if (each.exact or not (self._exact and source.exact))
            # Where nobody knows the file, the replica itself has the same one.
            and (each.file_sha256 == source.file_sha256 if source.file_sha256 else each.replica == source.replica)
        ]

    @property
    def file(self) -> str | None:
        """What the tokens were computed from, where that is known."""
        return self._file if self._source is None else self._source.file_sha256

    def begin_anew(self) -> None:
        """Nobody goes on with the tokens, and nobody has seen them."""
        self._so_far = [[] for _ in self._so_far]
        self._source = None

    def ended(self, replica: ReplicaId, failure: Failure, now: float, tokens: int) -> None:
        """An attempt failed or was given up, after it had given so many tokens."""
        if tokens:
            self.tried.clear()
            self.rounds = 0
            self._kills_here = 0
        self.tried[replica] = now + (failure.retry_after or 0.0)
        self._said[replica] = failure
        if may_have_killed(failure):
            self._kills += 1
            self._kills_here += 1

    @property
    def kills_what_runs_it(self) -> bool:
        """Whether as many workers died under it as a call may lose."""
        return self._kills_here >= MOST_KILLS_HERE or self._kills >= MOST_KILLS

    def again_from(self, ready: Collection[ReplicaId], now: float) -> tuple[float, Failure | None]:
        """When the first of these, all of which were tried, may be asked again, and what it failed with."""
        first = min(ready, key=lambda replica: self.tried.get(replica, now))
        return self.tried.get(first, now), self._said.get(first)

    def forgive(self, now: float) -> None:
        """Those whose time has come may be asked again."""
        self.tried = {replica: until for replica, until in self.tried.items() if until > now}
