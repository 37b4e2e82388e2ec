"""The target that is a worker process of this node."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tars.core.types import Assignment
from tars.messages.base import CallContext
from tars.messages.inference import ServedBy
from tars.workers.engine import Event, Work
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

    def run(self, work: Work, call: CallContext) -> AsyncIterator[Event]:
        """The worker's events; closing the iterator cancels the work."""
        return self._worker.run(work, call.deadline)
