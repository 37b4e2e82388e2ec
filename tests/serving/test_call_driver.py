"""One call's driver: tasks, stops, waits and backpressure, with scripted targets and the real machine."""

import asyncio
import random
import time
from contextlib import aclosing

import pytest

from tars.core.routing import Candidate
from tars.core.types import Deadline, ModelKind, NodeId, ReplicaId, ReplicaState
from tars.errors import (
    Cancelled,
    DoesNotFit,
    Draining,
    PeerUnreachable,
    StaleRoute,
    StillLoading,
    TarsError,
    WorkerCrashed,
)
from tars.messages.base import CallContext, SavedState
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    Progress,
    ServedBy,
    Timings,
    TokenLogprob,
    Usage,
)
from tars.serving.call_driver import MOST_UNREAD
from tars.serving.call_record import CallRecords
from tars.serving.router import Router, ServedModel

SECONDS = 10.0
CHAT = ServedModel("chat", ModelKind.CHAT, (), deployed=False)
WORK = ChatParams(messages=[ChatMessage(role="user", content="hello")])
TEXTS = EmbedParams(input=["a", "b"])
VECTORS = Embedded(vectors=["AAAA", "AAAA"], dimensions=1, prompt_tokens=2, timings=Timings())


def done(text="hi", **more):
    usage = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    return Generated(text=text, finish_reason="stop", usage=usage, timings=Timings(), **more)


def token(number, **more):
    return Delta(text=f"{number} ", token_ids=[number], **more)


class Replica:
    """Plays a script: events, errors, and `asyncio.Event`s to wait for."""

    def __init__(self, name, *script, local=True, state=ReplicaState.READY, sha="f"):
        self.served_by = ServedBy(node=f"node-{name}", replica=name, device="d")
        self.script, self.local, self.state, self.sha = script, local, state, sha
        self.works, self.resumes = [], []
        self.running = self.given = 0
        self.started = asyncio.Event()
        self.closed = asyncio.Event()

    async def run(self, work, call, resume=None):
        self.works.append(work)
        self.resumes.append(resume)
        self.running += 1
        self.started.set()
        try:
            for step in self.script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, BaseException):
                    raise step
                else:
                    self.given += 1
                    yield step
        finally:
            self.running -= 1
            self.closed.set()


class Fleet:
    """The first replica is asked first."""

    def __init__(self, *replicas, why=None):
        self.replicas = {each.served_by.replica: each for each in replicas}
        self.why = why
        self.asked = []
        self.refusal = None
        self.waiting = asyncio.Event()
        self._change = asyncio.Event()

    def changed(self):
        self._change.set()
        self._change = asyncio.Event()

    def models(self):
        return [CHAT]

    def loadable(self):
        return []

    def candidates(self, model):
        return [
            Candidate(
                ReplicaId(name),
                model,
                ModelKind.CHAT,
                each.state,
                node=NodeId(each.served_by.node),
                local=each.local,
                queued=number,
                file_sha256=each.sha,
            )
            for number, (name, each) in enumerate(self.replicas.items())
        ]

    def target(self, replica):
        return self.replicas[replica]

    def not_ready(self, model):
        return self.why or StillLoading("chat is loading", details={"stage": "load", "percent": 0.0})

    async def wait_change(self):
        self.waiting.set()
        await self._change.wait()

    async def ask_to_load(self, model):
        self.asked.append(model)
        if self.refusal is not None:
            raise self.refusal


def call(seconds=SECONDS, **more):
    return CallContext(Deadline(time.monotonic() + seconds), "trace", **more)


async def collect(router, work=WORK, context=None):
    async with asyncio.timeout(SECONDS), aclosing(router.run(CHAT, work, context or call())) as events:
        return [item async for item in events]


def hedging(fleet):
    """A router that has seen enough answers to know that they take a millisecond, and may compute some twice."""
    router = Router(fleet)
    for _ in range(40):
        router.state.deadlines.saw_answer("chat", 2, 0.001, time.monotonic())
        router.state.hedges.answered(64)
    return router


def nothing_left(router, fleet):
    for name, replica in fleet.replicas.items():
        assert replica.running == 0
        assert router.state.ledger.in_flight(name) == 0


# --- two at once --------------------------------------------------------------------------------------------------------


async def test_a_slow_answer_is_asked_for_twice_and_the_loser_is_stopped():
    slow, quick = Replica("slow", asyncio.Event()), Replica("quick", VECTORS)
    fleet = Fleet(slow, quick)
    router = hedging(fleet)
    events = await collect(router, TEXTS)
    assert [event for event, _ in events] == [VECTORS]
    said = [(each.replica, each.outcome) for each in events[0][1].attempts]
    assert said == [("slow", "hedge_lost"), ("quick", "answered")]
    assert "hedge" in events[0][1].attempts[1].reason
    assert slow.closed.is_set(), "before the caller has gone on"
    assert dict(router.attempts()) == {("first", "hedge_lost"): 1, ("hedge", "answered"): 1}
    nothing_left(router, fleet)


async def test_the_first_one_may_still_win_against_its_hedge():
    gate = asyncio.Event()
    first, second = Replica("first", gate, VECTORS), Replica("second", asyncio.Event())
    fleet = Fleet(first, second)
    router = hedging(fleet)
    calling = asyncio.create_task(collect(router, TEXTS))
    await asyncio.wait_for(second.started.wait(), SECONDS)
    gate.set()
    ((_, served_by),) = await calling
    assert [(each.replica, each.outcome) for each in served_by.attempts] == [
        ("first", "answered"),
        ("second", "hedge_lost"),
    ]
    nothing_left(router, fleet)


async def test_a_hedge_that_fails_leaves_the_first_one_at_work():
    gate = asyncio.Event()
    first, second = Replica("first", gate, VECTORS), Replica("second", PeerUnreachable("gone"))
    fleet = Fleet(first, second)
    router = hedging(fleet)
    calling = asyncio.create_task(collect(router, TEXTS))
    await asyncio.wait_for(second.closed.wait(), SECONDS)
    gate.set()
    ((_, served_by),) = await calling
    assert served_by.replica == "first"
    nothing_left(router, fleet)


async def test_a_caller_who_leaves_stops_both():
    first, second = Replica("first", asyncio.Event()), Replica("second", asyncio.Event())
    fleet = Fleet(first, second)
    router = hedging(fleet)
    calling = asyncio.create_task(collect(router, TEXTS))
    await asyncio.wait_for(second.started.wait(), SECONDS)
    calling.cancel()
    await asyncio.wait({calling})
    nothing_left(router, fleet)
    assert dict(router.attempts()) == {("first", "cancelled"): 1, ("hedge", "cancelled"): 1}


# --- streams ------------------------------------------------------------------------------------------------------------


async def test_two_breaks_in_one_stream_lose_and_repeat_nothing():
    replicas = [
        Replica("a", token(1), token(2), WorkerCrashed("died")),
        Replica("b", token(3), PeerUnreachable("gone"), local=False),
        Replica("c", token(4), done("1 2 3 4 ")),
    ]
    router = Router(Fleet(*replicas))
    events = await collect(router)
    assert "".join(event.text for event, _ in events[:-1]) == "1 2 3 4 "
    assert [resume and resume.answers for each in replicas for resume in each.resumes] == [None, [[1, 2]], [[1, 2, 3]]]
    assert len({each.works[0].seed for each in replicas}) == 1
    assert [(each.outcome, each.tokens) for each in events[-1][1].attempts] == [
        ("worker_crashed", 2),
        ("peer_unreachable", 1),
        ("answered", 1),
    ]
    assert dict(router.attempts()) == {
        ("first", "worker_crashed"): 1,
        ("continuation", "peer_unreachable"): 1,
        ("continuation", "answered"): 1,
    }
    assert dict(router.calls_at_peers()) == {("node-b", "peer_unreachable"): 1}


async def test_log_probabilities_of_before_the_break_are_in_the_whole_answer():
    said = [TokenLogprob(token=str(number), token_id=number, logprob=-0.1) for number in (1, 2)]
    first = Replica("a", token(1, logprobs=[said[0]]), WorkerCrashed("died"))
    second = Replica("b", token(2, logprobs=[said[1]]), done("1 2 ", logprobs=[said[1]]))
    events = await collect(Router(Fleet(first, second)), WORK.model_copy(update={"logprobs": 0}))
    assert events[-1][0].logprobs == said


async def test_an_unbroken_answer_is_handed_on_as_it_came():
    answer = done()
    events = await collect(Router(Fleet(Replica("a", token(1), answer))))
    assert events[-1][0] is answer


async def test_the_callers_own_seed_is_kept_and_a_forwarded_call_gets_none():
    replica = Replica("a", done())
    await collect(Router(Fleet(replica)), WORK.model_copy(update={"seed": 7}))
    await collect(Router(Fleet(replica)), WORK, call(hops=1))
    await collect(Router(Fleet(replica)))
    assert [each.seed for each in replica.works[:2]] == [7, None]
    assert replica.works[2].seed is not None


async def test_calls_under_one_key_draw_the_same_numbers():
    replica = Replica("a", done())
    for key in ("k", "k", "other"):
        await collect(Router(Fleet(replica)), WORK, call(idempotency_key=key))
    first, second, third = (each.seed for each in replica.works)
    assert first == second != third


async def test_a_forwarded_call_goes_on_where_its_gateway_says_and_breaks_there():
    from tars.messages.base import ResumeMeta

    begun = ResumeMeta(answers=[[1, 2]], seed=5)
    broken, other = Replica("a", token(3), WorkerCrashed("died")), Replica("b", done())
    with pytest.raises(WorkerCrashed):
        await collect(Router(Fleet(broken, other)), WORK, call(hops=1, resume=begun))
    assert broken.resumes == [begun]
    assert other.works == []


async def test_a_forwarded_answer_goes_on_only_in_the_file_that_it_was_begun_in():
    from tars.messages.base import ResumeMeta

    begun = ResumeMeta(answers=[[1, 2]], seed=5, file_sha256="g")
    other, same = Replica("a", done()), Replica("b", done(), sha="g")
    await collect(Router(Fleet(other, same)), WORK, call(hops=1, resume=begun))
    assert (other.works, same.resumes) == ([], [begun])


async def test_a_forwarded_call_is_answered_from_the_file_that_its_gateway_counts_on():
    """A PC with two cards has the model in two files; what breaks goes on elsewhere, where the gateway believes that file to be."""
    other, same = Replica("a", done()), Replica("b", done(), sha="g")
    await collect(Router(Fleet(other, same)), WORK, call(hops=1, file_sha256="g"))
    assert (other.works, len(same.works)) == ([], 1)
    with pytest.raises(StaleRoute):
        await collect(Router(Fleet(other)), WORK, call(hops=1, file_sha256="g"))


async def test_an_answer_that_nobody_has_seen_is_begun_anew_where_there_is_only_another_file():
    first = Replica("a", token(1), token(2), WorkerCrashed("died"))
    second = Replica("b", token(7), WorkerCrashed("died"), sha="g")
    third = Replica("c", token(8), done("7 8 "), sha="g")
    events = await collect(Router(Fleet(first, second, third)))
    assert (second.resumes, third.resumes[0].answers) == ([None], [[7]])
    assert third.resumes[0].file_sha256 == "g"
    assert events[-1][0].text == "7 8 "


async def test_an_answer_that_was_shown_waits_for_its_own_file():
    first = Replica("a", token(1), WorkerCrashed("died"))
    second = Replica("b", done(), sha="g")
    with pytest.raises(TarsError):
        await collect(Router(Fleet(first, second)), WORK, call(0.5, streamed=True))
    assert second.works == []


async def test_a_handed_over_answer_goes_on_with_its_saved_state_and_what_was_held_back():
    saved = SavedState(node="n", id="x", bytes=3, sha256="0" * 64)
    moved = Draining("drained", details={"saved": saved.model_dump(), "tokens": [[1, 2, 3]]})
    first, second = Replica("a", token(1), moved), Replica("b", token(4), done())
    await collect(Router(Fleet(first, second)))
    (resume,) = second.resumes
    assert (resume.state, resume.answers, resume.handed_out) == (saved, [[1, 2, 3]], [1])


async def test_a_saved_state_that_nobody_understands_costs_only_the_state():
    moved = Draining("drained", details={"saved": {"of": "another version"}})
    first, second = Replica("a", token(1), moved), Replica("b", token(4), done())
    await collect(Router(Fleet(first, second)))
    (resume,) = second.resumes
    assert (resume.state, resume.answers) == (None, [[1]])


async def test_a_slow_reader_is_waited_for_and_loses_nothing():
    many = 5 * MOST_UNREAD
    replica = Replica("a", *(token(number) for number in range(many)), done())
    router = Router(Fleet(replica))
    events = router.run(CHAT, WORK, call())
    first = await anext(events)
    for _ in range(10):
        await asyncio.sleep(0)
    assert replica.given <= MOST_UNREAD + 1
    rest = [event async for event, _ in events]
    assert [event.token_ids[0] for event in (first[0], *rest[:-1])] == list(range(many))


async def test_what_came_before_a_failure_is_read_before_it_is_heard_of():
    replica = Replica("a", token(1), token(2), DoesNotFit("the caller's"))
    events = Router(Fleet(replica)).run(CHAT, WORK, call())
    assert (await anext(events))[0].token_ids == [1]
    await asyncio.wait_for(replica.closed.wait(), SECONDS)
    assert (await anext(events))[0].token_ids == [2]
    with pytest.raises(DoesNotFit):
        await anext(events)


async def test_an_attempt_that_somebody_else_cancels_ends_the_call():
    with pytest.raises(Cancelled):
        await collect(Router(Fleet(Replica("a", asyncio.CancelledError()))))


async def test_a_peer_of_which_no_address_is_known_is_passed_over_and_blamed_for_nothing():
    class Unknown(Fleet):
        def target(self, replica):
            if replica.startswith("nowhere"):
                raise PeerUnreachable("no address")
            return super().target(replica)

    nowhere = [Replica(f"nowhere-{number}", local=False) for number in range(3)]
    fleet = Unknown(*nowhere, Replica("here", done()))
    events = await collect(Router(fleet))
    assert [each.outcome for each in events[-1][1].attempts] == ["peer_unreachable"] * 3 + ["answered"]


async def test_a_fault_of_the_fleets_while_a_load_is_waited_for_ends_the_call():
    class Faulty(Fleet):
        async def wait_change(self):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await collect(Router(Faulty(Replica("a", state=ReplicaState.LOADING))))


# --- waiting for a replica ----------------------------------------------------------------------------------------------


def loading(percent):
    return StillLoading("chat is loading", details={"stage": "load", "percent": percent, "node_name": "big"})


async def test_a_call_without_a_replica_has_one_loaded_and_hears_how_far_that_is():
    replica = Replica("a", token(1), done(), state=ReplicaState.LOADING)
    fleet = Fleet(replica, why=loading(10.0))
    router = Router(fleet)
    events = router.run(CHAT, WORK, call())
    assert await anext(events) == (Progress(stage="load", percent=10.0, node="big"), None)
    assert fleet.asked == ["chat"]
    fleet.why = loading(60.0)
    fleet.changed()
    assert await anext(events) == (Progress(stage="load", percent=60.0, node="big"), None)
    replica.state = ReplicaState.READY
    fleet.changed()
    assert [event.text async for event, _ in events] == ["1 ", "hi"]
    assert fleet.asked == ["chat"], "once"


async def test_the_same_progress_is_told_once():
    replica = Replica("a", done(), state=ReplicaState.LOADING)
    fleet = Fleet(replica, why=loading(10.0))
    events = Router(fleet).run(CHAT, WORK, call())
    await anext(events)
    for _ in range(3):
        fleet.waiting.clear()
        fleet.changed()
        await asyncio.wait_for(fleet.waiting.wait(), SECONDS)
    replica.state = ReplicaState.READY
    fleet.changed()
    assert isinstance((await anext(events))[0], Generated)
    await events.aclose()


async def test_what_cannot_be_loaded_is_said_at_once():
    fleet = Fleet()
    fleet.refusal = DoesNotFit("fits nowhere")
    with pytest.raises(DoesNotFit, match="fits nowhere"):
        await collect(Router(fleet))


async def test_a_load_that_fails_while_it_is_waited_for_is_said_then():
    fleet = Fleet(Replica("a", state=ReplicaState.LOADING), why=loading(10.0))
    calling = asyncio.create_task(collect(Router(fleet)))
    await asyncio.wait_for(fleet.waiting.wait(), SECONDS)
    fleet.why = DoesNotFit("no room after all")
    fleet.changed()
    with pytest.raises(DoesNotFit, match="no room after all"):
        await calling


async def test_a_deadline_that_comes_first_says_how_far_the_load_is():
    fleet = Fleet(Replica("a", state=ReplicaState.LOADING), why=loading(40.0))
    with pytest.raises(StillLoading, match="until its time budget ended") as met:
        await collect(Router(fleet), WORK, call(seconds=0.05))
    assert met.value.details == {"stage": "load", "percent": 40.0, "node_name": "big"}


async def test_a_forwarded_call_waits_for_no_load():
    fleet = Fleet(Replica("a", state=ReplicaState.LOADING))
    with pytest.raises(Exception, match="another one may"):
        await collect(Router(fleet), WORK, call(hops=1))
    assert fleet.asked == []


async def test_a_broken_stream_waits_for_its_replica_to_come_back():
    replica = Replica("a", token(1), WorkerCrashed("died"))
    fleet = Fleet(replica)

    def crashed():
        replica.state = ReplicaState.RESTARTING
        replica.script = (token(2), done())
        return WorkerCrashed("being restarted")

    events = Router(fleet).run(CHAT, WORK, call())
    assert (await anext(events))[0].token_ids == [1]
    fleet.why = crashed()
    waiting = asyncio.create_task(anext(events))
    await asyncio.wait_for(fleet.waiting.wait(), SECONDS)
    replica.state = ReplicaState.READY
    fleet.changed()
    assert (await waiting)[0].token_ids == [2]
    assert replica.resumes[1].answers == [[1]]
    await events.aclose()


async def test_a_caller_who_leaves_while_a_load_is_waited_for_leaves_nothing_behind():
    fleet = Fleet(Replica("a", state=ReplicaState.LOADING))
    before = asyncio.all_tasks()
    calling = asyncio.create_task(collect(Router(fleet)))
    await asyncio.wait_for(fleet.waiting.wait(), SECONDS)
    calling.cancel()
    await asyncio.wait({calling})
    assert asyncio.all_tasks() == before


async def test_what_a_call_waited_for_stands_in_its_record():
    records = CallRecords()
    replica = Replica("a", done(), state=ReplicaState.LOADING)
    fleet = Fleet(replica)
    calling = asyncio.create_task(collect(Router(fleet, records=records)))
    await asyncio.wait_for(fleet.waiting.wait(), SECONDS)
    replica.state = ReplicaState.READY
    fleet.changed()
    await calling
    (record,) = records.find("trace")
    assert [wait.what for wait in record.waits] == ["load"]
    assert record.waits[0].ended is not None
    assert [each.replica for each in record.attempts] == ["a"]


async def test_waits_between_tries_are_short_and_end_with_the_call():
    dice = random.Random(1)
    replica = Replica("a", PeerUnreachable("gone", details={"sent": False}), local=False)
    fleet = Fleet(replica)
    router = Router(fleet, rng=dice)
    calling = asyncio.create_task(collect(router))
    await asyncio.wait_for(replica.closed.wait(), SECONDS)
    replica.script = (done(),)
    ((_, served_by),) = await calling
    assert [each.outcome for each in served_by.attempts] == ["peer_unreachable", "answered"]
