"""The target that is this node's own worker."""

from tars.core.types import Assignment, Bytes, Deadline, DeviceId, MemoryEstimate, NodeId, ReplicaId, RuntimeSettings
from tars.messages.base import CallContext
from tars.messages.inference import TokenizeParams
from tars.serving.local_target import LocalTarget

ASSIGNMENT = Assignment(
    replica=ReplicaId("m@n-cpu#0"),
    model="m",
    variant="Q8_0",
    device=DeviceId("n/cpu"),
    node=NodeId("n"),
    memory=MemoryEstimate(Bytes(1), Bytes(1), Bytes(1), Bytes(1)),
    settings=RuntimeSettings(context=128),
    reason="",
)


class FakeWorker:
    def __init__(self):
        self.ran = []

    async def run(self, work, deadline):
        self.ran.append((work, deadline))
        yield "event"


async def test_runs_the_work_on_the_worker_within_the_deadline():
    worker, work, deadline = FakeWorker(), TokenizeParams(text="x"), Deadline(5.0)
    events = [
        event async for event in LocalTarget(ASSIGNMENT, "Card", False, worker).run(work, CallContext(deadline, "t"))
    ]
    assert events == ["event"]
    assert worker.ran == [(work, deadline)]


def test_says_who_serves_and_whether_the_device_is_simulated():
    served_by = LocalTarget(ASSIGNMENT, "Card", True, FakeWorker()).served_by
    assert (served_by.node, served_by.replica, served_by.device, served_by.simulated) == (
        "n",
        "m@n-cpu#0",
        "Card",
        True,
    )
