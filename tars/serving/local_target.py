"""The target that is a worker process of this node."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from tars.core.types import Assignment, ReplicaId
from tars.messages.base import CallContext, ResumeMeta
from tars.messages.inference import Delta, GenerationParams, ServedBy, TokenizeParams
from tars.serving.gate import Gate
from tars.serving.running_answers import RunningAnswers
from tars.workers.calls import CallHandle
from tars.workers.engine import Event, Resume, Work
from tars.workers.supervisor import ReplicaWorker


class LocalTarget:
    """Runs work on one of this node's replicas, behind its gate; see `targets.Target`."""

    def __init__(
        self,
        assignment: Assignment,
        device_name: str,
        simulated: bool,
        worker: ReplicaWorker,
        gate: Gate,
        answers: RunningAnswers,
    ):
        self._worker = worker
        self._gate = gate
        self._answers = answers
        self._served_by = ServedBy(
            node=assignment.node, replica=assignment.replica, device=device_name, simulated=simulated
        )

    @property
    def served_by(self) -> ServedBy:
        """This node, the replica and its device."""
        return self._served_by

    def run(self, work: Work, call: CallContext, resume: ResumeMeta | None = None) -> AsyncGenerator[Event]:
        """The worker's events, once it is the call's turn; closing the iterator cancels the work.

        A generation may leave for another replica while it runs: see `running_answers`.
        """
        if isinstance(work, TokenizeParams):
            # The model never sees it: it waits for nobody.
            return self._worker.run(work, call.deadline)
        if not isinstance(work, GenerationParams):
            return self._in_turn(work, call)
        return self._answers.run(
            ReplicaId(self._served_by.replica),
            self._worker,
            work,
            call,
            None if resume is None else begun(resume),
            None if resume is None else resume.state,
            start=partial(self._in_turn, work, call),
        )

    async def _in_turn(
        self, work: Work, call: CallContext, resume: Resume | None = None, handle: CallHandle | None = None
    ) -> AsyncGenerator[Event]:
        async with (
            self._gate.turn(call, work, begun=resume is not None) as turn,
            aclosing(self._worker.run(work, call.deadline, resume=resume, handle=handle, on_end=turn.ended)) as events,
        ):
            async for event in events:
                if isinstance(event, Delta):
                    turn.tokens += len(event.token_ids)
                yield event


def begun(resume: ResumeMeta, path: str | None = None) -> Resume:
    """The same in the worker's words. `path`: where the state is on this machine."""
    handed_out = resume.handed_out
    return Resume(
        generated=resume.answers,
        handed_out=[len(tokens) for tokens in resume.answers] if handed_out is None else handed_out,
        seed=resume.seed,
        ended=resume.ended,
        path=path,
    )
