"""The target that is this node's own worker."""

import asyncio

import pytest

from tars.core.types import Assignment, Bytes, Deadline, DeviceId, MemoryEstimate, NodeId, ReplicaId, RuntimeSettings
from tars.messages.base import CallContext, ResumeMeta
from tars.messages.inference import CompleteParams, TokenizeParams
from tars.serving.call_costs import Capacity
from tars.serving.gate import Gate
from tars.serving.kept_states import KeptStates
from tars.serving.local_target import LocalTarget, begun
from tars.serving.running_answers import RunningAnswers
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

    async def run(self, work, deadline, *, resume=None, handle=None, on_end=None):
        self.ran.append((work, deadline, resume))
        self.on_end = on_end
        yield "event"


def target_of(worker, gate=None, simulated=False):
    gate = gate or Gate(lambda: Capacity(1, 1, 10, 10.0), 10)
    return LocalTarget(ASSIGNMENT, "Card", simulated, worker, gate, RunningAnswers(KeptStates("n")))


@pytest.mark.parametrize("work", [TokenizeParams(text="x"), CompleteParams(prompt="x")])
async def test_runs_the_work_on_the_worker_within_the_deadline(work):
    worker, deadline = FakeWorker(), Deadline(1e9)
    events = [event async for event in target_of(worker).run(work, CallContext(deadline, "t"))]
    assert events == ["event"]
    assert worker.ran == [(work, deadline, None)]


async def test_a_call_waits_for_its_turn_until_the_engine_is_done_with_the_one_before():
    worker, gate, call = FakeWorker(), Gate(lambda: Capacity(1, 1, 10, 10.0), 10), CallContext(Deadline(1e9), "t")
    first = target_of(worker, gate).run(CompleteParams(prompt="first"), call)
    assert await anext(first) == "event"
    second = asyncio.ensure_future(anext(target_of(other := FakeWorker(), gate).run(CompleteParams(prompt="x"), call)))
    async with asyncio.timeout(10):
        while not gate.waiting:  # noqa: ASYNC110  # it counts, and has no event
            await asyncio.sleep(0)
    tokens = target_of(third := FakeWorker(), gate).run(TokenizeParams(text="x"), call)
    assert await anext(tokens) == "event", "which no model sees"
    assert (len(third.ran), len(other.ran), gate.waiting) == (1, 0, 1)
    worker.on_end(None)
    assert await second == "event"
    assert gate.waiting == 0


async def test_answers_that_were_begun_elsewhere_go_on_in_the_workers_words():
    worker, work, deadline = FakeWorker(), CompleteParams(prompt="x", n=2), Deadline(1e9)
    target = target_of(worker)
    resume = ResumeMeta(answers=[[1, 2], [3]], ended=[1], seed=9)
    assert [event async for event in target.run(work, CallContext(deadline, "t"), resume)] == ["event"]
    assert worker.ran[0][2] == Resume(generated=[[1, 2], [3]], handed_out=[2, 1], ended=[1], seed=9)


def test_tokens_that_were_held_back_are_not_taken_for_the_callers():
    resume = ResumeMeta(answers=[[1, 2, 3]], handed_out=[1], seed=9)
    assert begun(resume, "/state") == Resume(generated=[[1, 2, 3]], handed_out=[1], seed=9, path="/state")


def test_says_who_serves_and_whether_the_device_is_simulated():
    served_by = target_of(FakeWorker(), simulated=True).served_by
    assert (served_by.node, served_by.replica, served_by.device, served_by.simulated) == (
        "n",
        "m@n-cpu#0",
        "Card",
        True,
    )
