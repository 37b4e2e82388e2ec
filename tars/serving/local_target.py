"""The target that is a worker process of this node."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tars.core.types import Assignment
from tars.messages.base import CallContext, ResumeMeta
from tars.messages.inference import ServedBy
from tars.workers.engine import Event, Resume, Work
from tars.workers.supervisor import ReplicaWorker


class LocalTarget:
    """Runs work on one of this node's replicas; see `targets.Target`."""

    def __init__(self, assignment: Assignment, device_name: str, simulated: bool, worker: ReplicaWorker):
        self._worker = worker
        self._served_by = ServedBy(
            node=assignment.node, replica=assignment.replica, device=device_name, simulated=simulated
        )

    @property
    def served_by(self) -> ServedBy:
        """This node, the replica and its device."""
        return self._served_by

    def run(self, work: Work, call: CallContext, resume: ResumeMeta | None = None) -> AsyncIterator[Event]:
        """The worker's events; closing the iterator cancels the work."""
        return self._worker.run(work, call.deadline, resume=None if resume is None else begun(resume))


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
