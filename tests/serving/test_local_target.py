"""The target that is this node's own worker."""

from tars.core.types import Assignment, Bytes, Deadline, DeviceId, MemoryEstimate, NodeId, ReplicaId, RuntimeSettings
from tars.messages.base import CallContext, ResumeMeta
from tars.messages.inference import CompleteParams, TokenizeParams
from tars.serving.local_target import LocalTarget, begun
from tars.workers.engine import Resume

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

    async def run(self, work, deadline, *, resume=None):
        self.ran.append((work, deadline, resume))
        yield "event"


async def test_runs_the_work_on_the_worker_within_the_deadline():
    worker, work, deadline = FakeWorker(), TokenizeParams(text="x"), Deadline(5.0)
    events = [
        event async for event in LocalTarget(ASSIGNMENT, "Card", False, worker).run(work, CallContext(deadline, "t"))
    ]
    assert events == ["event"]
    assert worker.ran == [(work, deadline, None)]


async def test_answers_that_were_begun_elsewhere_go_on_in_the_workers_words():
    worker, work, deadline = FakeWorker(), CompleteParams(prompt="x", n=2), Deadline(5.0)
    target = LocalTarget(ASSIGNMENT, "Card", False, worker)
    resume = ResumeMeta(answers=[[1, 2], [3]], ended=[1], seed=9)
    assert [event async for event in target.run(work, CallContext(deadline, "t"), resume)] == ["event"]
    assert worker.ran[0][2] == Resume(generated=[[1, 2], [3]], handed_out=[2, 1], ended=[1], seed=9)


def test_tokens_that_were_held_back_are_not_taken_for_the_callers():
    resume = ResumeMeta(answers=[[1, 2, 3]], handed_out=[1], seed=9)
    assert begun(resume, "/state") == Resume(generated=[[1, 2, 3]], handed_out=[1], seed=9, path="/state")


def test_says_who_serves_and_whether_the_device_is_simulated():
    served_by = LocalTarget(ASSIGNMENT, "Card", True, FakeWorker()).served_by
    assert (served_by.node, served_by.replica, served_by.device, served_by.simulated) == (
        "n",
        "m@n-cpu#0",
        "Card",
        True,
    )
