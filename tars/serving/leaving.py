"""Which running answers leave this node's replicas, and when: a replica is unloaded, the node is drained, the node stops.

Law of this file: it chooses; `running_answers` moves. An answer leaves only where another ready replica of the same file is known, so that
it goes on at once; else it is finished here within the grace time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tars.core.mesh_messages import MemberState
from tars.core.routing import Candidate
from tars.core.types import ReplicaId, ReplicaState
from tars.serving.running_answers import RunningAnswer, RunningAnswers


class Leaving:
    """See the module's law. `candidates`: a model's replicas, this node's own and the peers'."""

    def __init__(self, answers: RunningAnswers, candidates: Callable[[str], Sequence[Candidate]]) -> None:
        self._answers = answers
        self._candidates = candidates

    def unloaded(self, replica: ReplicaId, model: str) -> None:
        """A replica of this node is about to end, and another one, here or elsewhere, may go on with its answers. Returns at once."""
        if self._has_successor(replica, model, elsewhere=False):
            self._answers.hand_over_soon(lambda answer: answer.replica == replica)

    async def drained(self) -> int:
        """This node gives its memory back: its answers go to other nodes. How many left."""
        return await self._answers.hand_over(self._goes_elsewhere)

    async def stopping(self) -> int:
        """This node's process ends, and with it the connections of its own callers: their answers would gain nothing by leaving, for they
        come through here wherever they are made. Those of other nodes' callers leave. How many did.
        """
        return await self._answers.hand_over(lambda answer: answer.from_peer and self._goes_elsewhere(answer))

    def _goes_elsewhere(self, answer: RunningAnswer) -> bool:
        return self._has_successor(answer.replica, answer.worker.spec.model, elsewhere=True)

    def _has_successor(self, replica: ReplicaId, model: str, *, elsewhere: bool) -> bool:
        candidates = self._candidates(model)
        own = next((each.file_sha256 for each in candidates if each.replica == replica), None)
        return own is not None and any(
            each.file_sha256 == own
            and each.state is ReplicaState.READY
            and each.replica != replica
            and (not elsewhere if each.local else each.standing is MemberState.ALIVE)
            for each in candidates
        )
