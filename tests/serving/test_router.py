"""The router, with fake targets and no network."""

import asyncio
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
    StaleRoute,
    StillLoading,
    TarsError,
    WorkerCrashed,
)
from tars.messages.base import CallContext
from tars.messages.inference import ChatMessage, ChatParams, Delta, Generated, ServedBy, Timings, Usage
from tars.serving.demand import prompt_text
from tars.serving.router import AVOID_UNREACHABLE_SECONDS, MOST_TRIES, Router, ServedModel

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
    """Plays a script: events to yield, or an exception to raise."""

    def __init__(self, name, *script):
        self.served_by = ServedBy(node="n", replica=name, device="d")
        self.script = script
        self.closed = False
        self.runs = 0

    async def run(self, work, call):
        self.runs += 1
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                await asyncio.sleep(0)
                yield step
        finally:
            self.closed = True


class FakeFleet:
    def __init__(self, *targets, models=(CHAT, EMBEDDING), queued=()):
        self.targets = {target.served_by.replica: target for target in targets}
        self._models = models
        self._queued = dict(queued)

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
        raise self.not_ready(model)

    def not_ready(self, model):
        return StillLoading("loading", retry_after_ms=5)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


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


async def test_a_failure_after_the_first_event_is_the_callers_to_see_and_nothing_is_repeated():
    second = FakeTarget("b", DONE)
    router = Router(FakeFleet(FakeTarget("a", Delta(text="h"), WorkerCrashed("died")), second), Clock())
    seen = []

    async def consume():
        async for event, _ in router.run(CHAT, WORK, call()):
            seen.append(event)

    with pytest.raises(WorkerCrashed):
        await consume()
    assert seen == [Delta(text="h")]
    assert second.runs == 0


async def test_when_all_fail_the_last_error_is_raised():
    router = Router(
        FakeFleet(FakeTarget("a", Overloaded("a is full")), FakeTarget("b", Overloaded("b is full"))), Clock()
    )
    with pytest.raises(Overloaded, match="b is full"):
        await collect(router)


async def test_a_deadline_that_is_gone_starts_nothing():
    target = FakeTarget("a", DONE)
    with pytest.raises(DeadlineExceeded):
        await collect(Router(FakeFleet(target), Clock()), call(at=0.0))
    assert target.runs == 0


async def test_without_a_ready_replica_the_fleets_reason_is_raised():
    with pytest.raises(StillLoading):
        await collect(Router(FakeFleet(), Clock()))


async def test_closing_the_stream_closes_the_target():
    target = FakeTarget("a", Delta(text="1"), Delta(text="2"), DONE)
    events = Router(FakeFleet(target), Clock()).run(CHAT, WORK, call())
    await anext(events)
    assert not target.closed
    await events.aclose()
    assert target.closed


async def test_learns_how_long_a_replica_takes():
    clock = Clock()

    class Slow(FakeTarget):
        async def run(self, work, call):
            clock.now += 2.0
            yield DONE

    router = Router(FakeFleet(Slow("a")), clock)
    await collect(router)
    # One token in two seconds: the next call of the usual size is predicted to take as long.
    assert "predicted 2.000 s" in router.ranked("chat-model")["a"]


# --- over several nodes -----------------------------------------------------------------------------------------------


class NodesFleet(FakeFleet):
    """Targets of which some are at peers, or not ready."""

    def __init__(self, *targets, remote=(), **more):
        super().__init__(*targets)
        self.remote = set(remote)
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
                **self.more,
            )
            for name in self.targets
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
    router = Router(NodesFleet(FakeTarget("here", Delta(text="h"), DONE)), Clock())
    waiting = router.run(CHAT, WORK, call())
    await anext(waiting)
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


@pytest.mark.parametrize(
    ("error", "runs"),
    [
        (WorkerCrashed("died"), 2),
        (PeerUnreachable("broke"), 2),
        (PeerUnreachable("refused", details={"sent": False}), 4),
        (Overloaded("full"), 4),
        (StaleRoute("gone"), 4),
        (PromptTooLong("long"), 1),
    ],
)
async def test_what_may_have_run_is_tried_once_more_and_what_was_refused_everywhere(error, runs):
    targets = [FakeTarget(name, error) for name in "abcd"]
    with pytest.raises(TarsError):
        await collect(Router(NodesFleet(*targets, remote="abcd"), Clock()))
    assert sum(target.runs for target in targets) == runs


async def test_a_call_asks_a_bounded_number_of_replicas():
    targets = [FakeTarget(str(number), Overloaded("full")) for number in range(3 * MOST_TRIES)]
    with pytest.raises(Overloaded):
        await collect(Router(NodesFleet(*targets), Clock()))
    assert sum(target.runs for target in targets) == MOST_TRIES


async def test_the_error_says_who_was_tried_where_there_were_several():
    router = Router(NodesFleet(FakeTarget("a", Overloaded("full")), FakeTarget("b", Overloaded("full"))), Clock())
    with pytest.raises(Overloaded) as met:
        await collect(router)
    assert {each["replica"] for each in met.value.details["attempts"]} == {"a", "b"}
    with pytest.raises(Overloaded) as met:
        await collect(Router(NodesFleet(FakeTarget("a", Overloaded("full"))), Clock()))
    assert "attempts" not in met.value.details


async def test_a_failure_sends_the_next_calls_elsewhere_for_a_while():
    clock = Clock()
    bad, good = FakeTarget("bad", PeerUnreachable("broke")), FakeTarget("good", DONE)
    fleet = NodesFleet(bad, remote=["bad", "good"])
    router = Router(fleet, clock)
    with pytest.raises(PeerUnreachable):
        await collect(router)
    fleet.targets["good"] = good
    for _ in range(5):
        await collect(router)
    assert (bad.runs, good.runs) == (1, 5)
    assert "failed a moment ago" in router.ranked("chat-model")["bad"]
    clock.now += AVOID_UNREACHABLE_SECONDS + 0.1
    assert "failed" not in router.ranked("chat-model")["bad"]
    assert dict(router.calls_at_peers()) == {("node-bad", "peer_unreachable"): 1, ("node-good", "answered"): 5}


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
    assert router._ledger.in_flight("gone") == 0


async def test_a_fault_of_a_targets_own_is_not_taken_for_a_replica_that_went_away():
    with pytest.raises(KeyError):
        await collect(Router(NodesFleet(FakeTarget("a", KeyError("bug"))), Clock()))


@pytest.mark.parametrize("end", ["answered", "failed", "closed", "cancelled"])
async def test_a_place_is_free_again_however_the_call_ends(end):
    script = {"failed": [Delta(text="h"), WorkerCrashed("died")], "cancelled": [asyncio.CancelledError()]}
    router = Router(NodesFleet(FakeTarget("a", *script.get(end, [Delta(text="h"), DONE]))), Clock())
    events = router.run(CHAT, WORK, call())
    if end == "closed":
        await anext(events)
        assert router._ledger.in_flight("a") == 1
        await events.aclose()
    else:
        with suppress(WorkerCrashed, asyncio.CancelledError):
            async for _ in events:
                assert router._ledger.in_flight("a") <= 1
    assert router._ledger.in_flight("a") == 0


async def test_a_hundred_calls_at_once_do_not_herd():
    targets = [FakeTarget(name, Delta(text="h"), DONE) for name in "abcd"]
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
    shared = {each.replica: router._ledger.annotated(each, 0.0, blocks).shared_tokens for each in fleet.candidates("")}
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
