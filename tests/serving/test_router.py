"""The router, with fake targets and no network."""

import asyncio
import random
from contextlib import aclosing, suppress

import pytest

from tars.core.prefix_affinity import blocks_of
from tars.core.routing import Candidate
from tars.core.types import Deadline, ModelKind, NodeId, ReplicaId, ReplicaState
from tars.errors import (
    DeadlineExceeded,
    Draining,
    Overloaded,
    PeerUnreachable,
    PromptTooLong,
    ReplicaFailed,
    StaleRoute,
    StillLoading,
    WorkerCrashed,
)
from tars.messages.base import CallContext
from tars.messages.inference import ChatMessage, ChatParams, Delta, Generated, ServedBy, Timings, Usage
from tars.serving.demand import prompt_text
from tars.serving.router import Router, ServedModel

WORK = ChatParams(messages=[ChatMessage(role="user", content="hello")])
DONE = Generated(
    text="hi",
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    timings=Timings(),
)
CHAT = ServedModel("chat-model", ModelKind.CHAT, ("chat-alias",))
EMBEDDING = ServedModel("embedder", ModelKind.EMBEDDING, ())


class FakeTarget:
    """Plays a script: events to yield, an exception to raise, or something to wait for."""

    def __init__(self, name, *script):
        self.served_by = ServedBy(node="n", replica=name, device="d")
        self.script = script
        self.closed = False
        self.works, self.resumes = [], []

    @property
    def runs(self):
        return len(self.works)

    async def run(self, work, call, resume=None):
        self.works.append(work)
        self.resumes.append(resume)
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                await asyncio.sleep(0)
                yield step
        finally:
            self.closed = True


class FakeFleet:
    def __init__(self, *targets, models=(CHAT, EMBEDDING), why=None):
        self.targets = {target.served_by.replica: target for target in targets}
        self._models = models
        self.why = why or StillLoading("loading", retry_after_ms=5)
        self.asked = []

    def models(self):
        return self._models

    def loadable(self):
        return ()

    def candidates(self, model):
        return [
            Candidate(ReplicaId(name), model, ModelKind.CHAT, ReplicaState.READY, queued=number)
            for number, name in enumerate(self.targets)
        ]

    def target(self, replica):
        return self.targets[replica]

    async def wait_change(self):
        await asyncio.Event().wait()

    async def ask_to_load(self, model):
        self.asked.append(model)

    def not_ready(self, model):
        return self.why


class Clock:
    """Stands still, unless `step` moves it with each look."""

    def __init__(self, step=0.0):
        self.now = 0.0
        self.step = step

    def __call__(self):
        self.now += self.step
        return self.now


class NoDice(random.Random):
    """Waits that are drawn are none."""

    def random(self):
        return 0.0


def impatient(fleet, step=0.0):
    """A router that waits for nothing between tries and has no more than three of them saved up."""
    router = Router(fleet, Clock(step), rng=NoDice())
    while router.state.retries.saved >= 4:
        router.state.retries.may_retry()
    return router


def call(at=10.0):
    return CallContext(Deadline(at), "trace")


async def collect(router, context=None):
    async with aclosing(router.run(CHAT, WORK, context or call())) as events:
        return [item async for item in events]


async def test_yields_the_targets_events_with_who_served_them():
    events = await collect(Router(FakeFleet(FakeTarget("a", Delta(text="hi"), DONE)), Clock()))
    assert [event for event, _ in events] == [Delta(text="hi"), DONE]
    assert [(a.replica, a.outcome) for a in events[-1][1].attempts] == [("a", "answered")]


@pytest.mark.parametrize("failure", [Overloaded("full"), WorkerCrashed("died"), StillLoading("soon")])
async def test_a_retryable_failure_before_the_first_event_moves_on_to_the_next_replica(failure):
    first, second = FakeTarget("a", failure), FakeTarget("b", DONE)
    events = await collect(Router(FakeFleet(first, second), Clock()))
    assert [(a.replica, a.outcome) for a in events[-1][1].attempts] == [("a", failure.kind), ("b", "answered")]
    assert first.closed
    assert second.closed


async def test_a_callers_own_mistake_is_never_tried_again():
    second = FakeTarget("b", DONE)
    with pytest.raises(PromptTooLong):
        await collect(Router(FakeFleet(FakeTarget("a", PromptTooLong("long")), second), Clock()))
    assert second.runs == 0


async def test_a_break_after_the_first_event_is_gone_on_from_elsewhere_and_nothing_is_repeated():
    first = FakeTarget("a", Delta(text="h", token_ids=[7]), WorkerCrashed("died"))
    second = FakeTarget("b", Delta(text="i", token_ids=[8]), DONE)
    events = await collect(Router(NodesFleet(first, second, ordered=True, file_sha256="f"), Clock()))
    assert [event.text for event, _ in events] == ["h", "i", "hi"]
    assert second.resumes[0].answers == [[7]]
    assert second.resumes[0].seed == first.works[0].seed == second.works[0].seed
    attempts = events[-1][1].attempts
    assert [(each.replica, each.outcome, each.tokens) for each in attempts] == [
        ("a", "worker_crashed", 1),
        ("b", "answered", 1),
    ]
    assert "continued after worker_crashed" in attempts[1].reason


async def test_when_everybody_is_full_the_last_error_is_raised_once_the_budget_for_retries_is_spent():
    targets = [FakeTarget(name, Overloaded(f"{name} is full", retry_after_ms=0)) for name in "ab"]
    router = impatient(FakeFleet(*targets))
    with pytest.raises(Overloaded, match="is full") as met:
        await collect(router)
    runs = sum(target.runs for target in targets)
    assert 2 <= runs <= 5
    assert [each["outcome"] for each in met.value.details["attempts"]] == ["overloaded"] * runs


async def test_a_deadline_that_is_gone_starts_nothing():
    target = FakeTarget("a", DONE)
    with pytest.raises(DeadlineExceeded):
        await collect(Router(FakeFleet(target), Clock()), call(at=0.0))
    assert target.runs == 0


async def test_a_model_that_will_not_come_is_said_at_once():
    fleet = FakeFleet(why=ReplicaFailed("broken file"))
    with pytest.raises(ReplicaFailed, match="broken file"):
        await collect(Router(fleet, Clock()))
    assert fleet.asked == [], "it is deployed: whoever removes it meanwhile has the last word"


async def test_closing_the_stream_closes_the_target():
    target = FakeTarget("a", Delta(text="1"), asyncio.Event(), DONE)
    events = Router(FakeFleet(target), Clock()).run(CHAT, WORK, call())
    await anext(events)
    assert not target.closed
    await events.aclose()
    assert target.closed


async def test_learns_how_long_a_replica_takes():
    clock = Clock()

    class Slow(FakeTarget):
        async def run(self, work, call, resume=None):
            clock.now += 2.0
            yield DONE

    router = Router(FakeFleet(Slow("a")), clock)
    await collect(router)
    # One token in two seconds: the next call of the usual size is predicted to take as long.
    assert "predicted 2.000 s" in router.ranked("chat-model")["a"]


# --- over several nodes -----------------------------------------------------------------------------------------------


class NodesFleet(FakeFleet):
    """Targets of which some are at peers, or not ready."""

    def __init__(self, *targets, remote=(), ordered=False, **more):
        super().__init__(*targets)
        self.remote = set(remote)
        self.ordered = ordered
        """The first one is asked first."""
        self.more = more

    def candidates(self, model):
        return [
            Candidate(
                ReplicaId(name),
                model,
                ModelKind.CHAT,
                ReplicaState.READY,
                node=NodeId(f"node-{name}"),
                local=name not in self.remote,
                queued=number if self.ordered else 0,
                **self.more,
            )
            for number, name in enumerate(self.targets)
        ]


def forwarded(at=10.0):
    return CallContext(Deadline(at), "trace", hops=1)


async def test_a_forwarded_call_never_leaves_this_node():
    there, here = FakeTarget("there", DONE), FakeTarget("here", DONE)
    router = Router(NodesFleet(there, here, remote=["there"]), Clock())
    for _ in range(5):
        await collect(router, forwarded())
    assert (there.runs, here.runs) == (0, 5)
    assert router.calls_from_peers == 5


async def test_a_forwarded_call_without_a_local_replica_is_a_stale_route_that_says_why():
    router = Router(NodesFleet(FakeTarget("there", DONE), remote=["there"]), Clock())
    with pytest.raises(StaleRoute, match="loading") as met:
        await collect(router, forwarded())
    assert met.value.retryable
    assert met.value.details["cause"] == "still_loading"


async def test_the_answer_to_a_peer_says_what_is_left_and_that_to_a_client_does_not():
    gate = asyncio.Event()
    target = FakeTarget("here", Delta(text="h"), gate, DONE)
    router = Router(NodesFleet(target), Clock())
    waiting = router.run(CHAT, WORK, call())
    await anext(waiting)
    target.script = (DONE,)
    assert (await collect(router, forwarded()))[-1][1].calls_left == 1
    assert (await collect(router))[-1][1].calls_left is None
    await waiting.aclose()


async def test_while_draining_calls_go_to_peers_only():
    there, here = FakeTarget("there", DONE), FakeTarget("here", DONE)
    router = Router(NodesFleet(there, here, remote=["there"]), Clock())
    router.draining = True
    await collect(router)
    assert (there.runs, here.runs) == (1, 0)
    assert router.can_take(CHAT, call())
    assert not router.can_take(CHAT, forwarded())
    with pytest.raises(Draining, match="drained"):
        await collect(router, forwarded())


@pytest.mark.parametrize("error", [WorkerCrashed("died"), PeerUnreachable("broke")])
async def test_what_may_have_run_and_killed_its_worker_is_tried_once_more(error):
    targets = [FakeTarget(name, error) for name in "abcd"]
    with pytest.raises(type(error)) as met:
        await collect(impatient(NodesFleet(*targets, remote="abcd")))
    assert sum(target.runs for target in targets) == 2
    assert len(met.value.details["attempts"]) == 2


@pytest.mark.parametrize("error", [PeerUnreachable("it left", details={"sent": False}), StaleRoute("it left")])
async def test_what_was_refused_is_tried_everywhere_and_again_while_there_is_time(error):
    targets = [FakeTarget(name, error) for name in "abcd"]
    with pytest.raises(DeadlineExceeded, match=r"after \d+ attempts, of which the last to fail said: it left") as met:
        await collect(impatient(NodesFleet(*targets, remote="abcd"), step=0.05))
    assert all(target.runs > 1 for target in targets)
    assert len(met.value.details["attempts"]) == sum(target.runs for target in targets)
    assert met.value.details["cause"] == error.kind


async def test_a_single_attempt_is_not_listed_in_the_error():
    with pytest.raises(PromptTooLong) as met:
        await collect(Router(NodesFleet(FakeTarget("a", PromptTooLong("long"))), Clock()))
    assert "attempts" not in met.value.details


async def test_a_failure_sends_the_next_calls_elsewhere_for_a_while():
    clock = Clock()
    bad, good = FakeTarget("bad", PeerUnreachable("broke")), FakeTarget("good", DONE)
    fleet = NodesFleet(bad, good, remote=["bad", "good"])
    router = Router(fleet, clock, rng=NoDice())
    router.load_told([("good", 4, 20)])
    await collect(router)
    assert (bad.runs, good.runs) == (1, 1), "the one with nothing to do first"
    for _ in range(5):
        await collect(router)
    assert (bad.runs, good.runs) == (1, 6)
    assert "failed a moment ago, asked last" in router.ranked("chat-model")["bad"]
    clock.now += 31
    assert "may be tried by one call" in router.ranked("chat-model")["bad"]
    assert dict(router.calls_at_peers()) == {("node-bad", "peer_unreachable"): 1, ("node-good", "answered"): 6}
    assert dict(router.attempts()) == {
        ("first", "peer_unreachable"): 1,
        ("retry", "answered"): 1,
        ("first", "answered"): 5,
    }


async def test_a_replica_that_goes_away_between_two_looks_is_passed_over():
    gone, good = FakeTarget("gone", DONE), FakeTarget("good", DONE)

    class Vanishing(NodesFleet):
        def target(self, replica):
            if replica == "gone":
                raise KeyError(replica)
            return super().target(replica)

    router = Router(Vanishing(gone, good), Clock())
    for _ in range(6):
        assert (await collect(router))[-1][1].replica == "good"
    assert router.state.ledger.in_flight("gone") == 0


async def test_a_fault_of_a_targets_own_is_not_taken_for_a_replica_that_went_away():
    with pytest.raises(KeyError):
        await collect(Router(NodesFleet(FakeTarget("a", KeyError("bug"))), Clock()))


@pytest.mark.parametrize("end", ["answered", "failed", "closed"])
async def test_a_place_is_free_again_however_the_call_ends(end):
    script = {"failed": [Delta(text="h"), PromptTooLong("long")], "closed": [Delta(text="h"), asyncio.Event()]}
    router = Router(NodesFleet(FakeTarget("a", *script.get(end, [Delta(text="h"), DONE]))), Clock())
    events = router.run(CHAT, WORK, call())
    if end == "closed":
        await anext(events)
        assert router.state.ledger.in_flight("a") == 1
        await events.aclose()
    else:
        with suppress(PromptTooLong):
            async for _ in events:
                assert router.state.ledger.in_flight("a") <= 1
    assert router.state.ledger.in_flight("a") == 0


async def test_a_hundred_calls_at_once_do_not_herd():
    targets = [FakeTarget(name, Delta(text="h"), asyncio.Event()) for name in "abcd"]
    router = Router(NodesFleet(*targets, remote="abcd"), Clock())
    running = [router.run(CHAT, WORK, CallContext(Deadline(10.0), f"call-{number}")) for number in range(100)]
    await asyncio.gather(*(anext(events) for events in running))
    assert [target.runs for target in targets] == [25, 25, 25, 25]
    for events in running:
        await events.aclose()


async def test_chats_with_the_same_beginning_go_to_the_same_replica():
    targets = [FakeTarget(name, DONE) for name in "abcd"]
    fleet = NodesFleet(*targets, speed=50.0, prefill_speed=500.0)
    router = Router(fleet, Clock())
    system = ChatMessage(role="system", content="You are the help desk. " * 100)
    for number in range(20):
        work = ChatParams(messages=[system, ChatMessage(role="user", content=f"question {number}")])
        context = CallContext(Deadline(10.0), f"call-{number}")
        async for _ in router.run(CHAT, work, context):
            pass
    assert sorted(target.runs for target in targets) == [0, 0, 0, 20]
    # Its worker starts anew, with an empty cache: another one is as good.
    first = next(target for target in targets if target.runs)
    first.script = (WorkerCrashed("died"),)
    work = ChatParams(messages=[system, ChatMessage(role="user", content="and now?")])
    async for _, served_by in router.run(CHAT, work, call()):
        assert served_by.replica != first.served_by.replica
    blocks = blocks_of(prompt_text(work))
    shared = {
        each.replica: router.state.ledger.annotated(each, 0.0, blocks).shared_tokens for each in fleet.candidates("")
    }
    assert shared[first.served_by.replica] == 0
    assert sum(tokens > 0 for tokens in shared.values()) == 1


async def test_a_peers_word_on_its_queue_sends_calls_elsewhere():
    busy, idle = FakeTarget("busy", DONE), FakeTarget("idle", DONE)
    heard = []
    router = Router(NodesFleet(busy, idle, remote=["busy", "idle"]), Clock(), heard.append)
    router.load_told([("busy", 4, 20)])
    for number in range(10):
        async for _ in router.run(CHAT, WORK, CallContext(Deadline(10.0), f"call-{number}")):
            pass
    assert (busy.runs, idle.runs) == (0, 10)
    assert heard == ["node-idle"] * 10, "whoever answers lives"


async def test_the_reasons_are_logged_where_somebody_listens(caplog):
    router = Router(NodesFleet(FakeTarget("a", DONE), FakeTarget("b", DONE)), Clock())
    with caplog.at_level("DEBUG", logger="tars.serving.router"):
        await collect(router)
    assert "rank 2: predicted" in caplog.text
