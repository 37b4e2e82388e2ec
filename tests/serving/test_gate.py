"""What is let in to an engine, in which order, and what is refused at once. The engine is the test: it ends calls when it says so."""

import asyncio
import random

import pytest
from hand_clock import Clock

from tars.core.types import Deadline
from tars.errors import Overloaded, WorkerCrashed
from tars.messages.base import CallContext
from tars.messages.inference import CompleteParams, EmbedParams, Generated, RerankParams, Timings, Usage
from tars.messages.node import LoadedInfo, MeasuredSpeeds, TunedSettings
from tars.serving.call_costs import BATCHES_AHEAD, LEAST_CALLS, SPEED_TOKENS, Capacity, capacity_of
from tars.serving.gate import RETRY_LEAST_SECONDS, Gate

ONE_SLOT = Capacity(room=1, full=1, most_calls=100, own_word=10.0)


@pytest.fixture
def clock():
    return Clock(100.0)


class Bench:
    """A gate, and calls that stay inside until the test lets them out."""

    def __init__(self, clock, capacity=ONE_SLOT, queue_limit=64):
        self.clock = clock
        self.capacity = capacity
        self.gate = Gate(lambda: self.capacity, queue_limit, clock, random.Random(1))
        self.inside = []
        self.tasks = []

    def call(self, caller, *, seconds=1000.0, priority=None, work=None, end=None):
        """Start a call; its task. It is inside once its caller's name stands in `inside`."""
        context = CallContext(Deadline(self.clock.now + seconds), "t", caller=caller, priority=priority)
        leave = asyncio.Event()

        async def run():
            async with self.gate.turn(context, work or CompleteParams(prompt="", max_tokens=10)) as turn:
                self.inside.append(caller)
                await leave.wait()
                if end is not None:
                    turn.ended(end)
            return caller

        task = asyncio.create_task(run())
        task.leave = leave
        self.tasks.append(task)
        return task

    async def ended(self, task):
        task.leave.set()
        await task
        await settled()


@pytest.fixture
async def bench(clock):
    made = Bench(clock)
    yield made
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)
    # Whatever happened, nobody is left in the queue or counted as running.
    made.capacity = ONE_SLOT
    assert made.gate.waiting == 0
    assert made.gate.describe().expected_ms == 0.0
    assert not made.gate._running
    assert made.gate._room == 0.0


async def settled():
    """Let everything that is ready run: each step of a call's way in takes one turn of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


def generated(tokens, prompt=0):
    usage = Usage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)
    return Generated(text="", finish_reason="stop", usage=usage, timings=Timings())


async def test_what_finds_room_goes_in_at_once_and_the_rest_waits_for_it(bench):
    bench.capacity = Capacity(room=3, full=2, most_calls=100, own_word=10.0)
    tasks = [bench.call("a") for _ in range(5)]
    await settled()
    assert len(bench.inside) == 3
    assert bench.gate.waiting == 2
    await bench.ended(tasks[0])
    assert (len(bench.inside), bench.gate.waiting) == (4, 1)


async def test_a_caller_s_flood_holds_nobody_else_up(bench):
    flood = [bench.call("greedy") for _ in range(20)]
    await settled()
    bench.call("modest")
    await settled()
    await bench.ended(flood[0])
    assert bench.inside == ["greedy", "modest"]


async def test_interactive_calls_go_before_batch_calls(bench):
    first = bench.call("x")
    await settled()
    for _ in range(3):
        bench.call("night job", priority="batch")
    await settled()
    bench.call("person", priority="interactive")
    await settled()
    await bench.ended(first)
    assert bench.inside == ["x", "person"]
    description = bench.gate.describe()
    assert (description.interactive, description.batch, description.callers) == (0, 3, 1)


async def test_an_answer_that_goes_on_here_waits_for_nobody_and_is_charged(bench):
    first = bench.call("x")
    await settled()
    waiting = [bench.call("a"), bench.call("b")]
    await settled()
    context = CallContext(Deadline(200.0), "t", caller="a")
    async with bench.gate.turn(context, CompleteParams(prompt="", max_tokens=10), begun=True):
        assert bench.gate.waiting == 2
        await bench.ended(first)
        assert bench.inside == ["x"], "it has the slot now"
    await settled()
    assert bench.inside == ["x", "b"], "it was the other one's turn"
    assert not any(task.done() for task in waiting)


async def test_a_call_of_several_answers_takes_as_many_slots(bench):
    bench.capacity = Capacity(room=4, full=4, most_calls=100, own_word=10.0)
    three = bench.call("a", work=CompleteParams(prompt="", n=3))
    await settled()
    bench.call("b", work=CompleteParams(prompt="", n=2))
    bench.call("c")
    await settled()
    assert bench.inside == ["a"], "who waits first is not overtaken by who is small"
    await bench.ended(three)
    assert bench.inside == ["a", "b", "c"]


async def test_a_call_of_many_answers_leaves_no_slot_idle_and_is_overtaken_by_nobody(bench):
    bench.capacity = Capacity(room=5, full=4, most_calls=100, own_word=10.0)
    ones = [bench.call("a") for _ in range(5)]
    await settled()
    bench.call("many", work=CompleteParams(prompt="", n=16))
    bench.call("b")
    await settled()
    await bench.ended(ones[0])
    assert bench.inside == ["a"] * 5
    await bench.ended(ones[1])
    assert bench.inside == [*["a"] * 5, "many"], "three run, and two of its answers find a slot"
    for one in ones[2:]:
        await bench.ended(one)
    assert bench.gate.waiting == 1


async def test_an_answer_of_more_slots_than_there_are_still_gets_its_turn(bench):
    bench.call("a", work=CompleteParams(prompt="", n=3))
    await settled()
    assert bench.inside == ["a"]


async def test_a_call_that_would_begin_too_late_is_refused_at_once_and_told_when_to_come_back(bench):
    """Ten units a second by the replica's own word, ten units a call: a second each, one after the other."""
    for _ in range(5):
        bench.call("a")
    await settled()
    # Four wait, and the one that runs is taken to be half done: 4.5 s, and two seconds are kept for the answer.
    late = bench.call("a", seconds=5.0)
    with pytest.raises(Overloaded, match=r"would wait about 4\.5 s .*4 calls wait") as caught:
        await late
    assert 1500 <= caught.value.retry_after_ms <= 2250
    assert caught.value.details["reason"] == "late"
    bench.call("a", seconds=7.0)
    await settled()
    assert bench.gate.waiting == 5
    assert bench.gate.describe().refused == {"late": 1}


async def test_where_nobody_waits_no_call_is_refused_however_little_time_it_has(bench):
    """Sending it again would not help it."""
    bench.call("a", seconds=0.01)
    await settled()
    assert bench.inside == ["a"]


async def test_of_a_call_that_asks_for_more_than_its_time_allows_half_of_the_time_may_be_waited(bench):
    bench.call("a")
    await settled()
    long = CompleteParams(prompt="", max_tokens=1000)
    bench.call("a", seconds=2.0, work=long)
    await settled()
    assert bench.gate.waiting == 1
    with pytest.raises(Overloaded):
        await bench.call("a", seconds=0.9, work=long)


async def test_a_call_whose_turn_does_not_come_is_refused_while_there_is_time_to_go_elsewhere(bench):
    bench.call("a")
    await settled()
    waiting = bench.call("b", seconds=1.0, work=CompleteParams(prompt="", max_tokens=1))
    short = bench.call("b", seconds=0.9, work=CompleteParams(prompt="", max_tokens=7))
    # Both are let wait; the second one asks for 0.7 s of its 0.9, so that it leaves after 0.675.
    with pytest.raises(Overloaded, match="was not begun"):
        await asyncio.wait_for(short, 5)
    assert bench.gate.waiting == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert bench.gate.waiting == 0


async def test_a_full_queue_refuses_and_says_how_full_it_is(clock):
    bench = Bench(clock, queue_limit=2)
    tasks = [bench.call("a") for _ in range(4)]
    with pytest.raises(Overloaded, match="2 calls wait for this replica already") as caught:
        await asyncio.wait_for(tasks[3], 5)
    assert caught.value.retry_after_ms >= RETRY_LEAST_SECONDS * 1000
    assert caught.value.details == {"limit": 2, "queued": 2, "reason": "full"}
    for task in tasks[:3]:
        await bench.ended(task)


async def test_a_full_queue_drops_a_call_of_who_has_the_most_in_it_for_who_has_less(clock):
    bench = Bench(clock, queue_limit=2)
    flood = [bench.call("greedy") for _ in range(3)]
    await settled()
    modest = bench.call("modest")
    with pytest.raises(Overloaded, match="for a caller who has fewer"):
        await asyncio.wait_for(flood[2], 5)
    await bench.ended(flood[0])
    assert bench.inside == ["greedy", "modest"]
    assert bench.gate.describe().refused == {"dropped": 1}
    await bench.ended(modest)
    await bench.ended(flood[1])
    assert bench.gate.waiting == 0


async def test_a_call_that_is_cancelled_leaves_the_queue_and_one_that_runs_makes_room(bench):
    running, waiting, last = bench.call("a"), bench.call("b"), bench.call("c")
    await settled()
    waiting.cancel()
    await settled()
    assert bench.gate.waiting == 1
    running.cancel()
    await settled()
    assert bench.inside == ["a", "c"]
    assert not last.done()


async def test_a_call_that_is_cancelled_in_the_moment_in_which_its_turn_comes_makes_room(bench):
    running, waiting, last = bench.call("a"), bench.call("b"), bench.call("c")
    await settled()
    bench.gate.leave(next(iter(bench.gate._running)), None)  # the place is given, and its task has not run yet
    waiting.cancel()
    await settled()
    assert bench.inside == ["a", "c"]
    assert not running.done()
    assert not last.done()


async def test_the_engine_s_end_makes_room_however_slowly_the_caller_reads(bench):
    context = CallContext(Deadline(200.0), "t", caller="slow reader")
    async with bench.gate.turn(context, CompleteParams(prompt="")) as turn:
        bench.call("next")
        await settled()
        assert bench.inside == []
        turn.ended(generated(5))
        turn.ended(None)
        await settled()
        assert bench.inside == ["next"]


async def test_when_the_worker_is_gone_all_that_waits_hears_from_it_why(clock):
    bench = Bench(clock)
    running = bench.call("a")
    await settled()

    async def through():
        context = CallContext(Deadline(1000.0), "t")
        async with bench.gate.turn(context, CompleteParams(prompt="")):
            raise WorkerCrashed("as the worker says it")

    waiting = [asyncio.create_task(through()) for _ in range(3)]
    await settled()
    bench.capacity = None
    bench.gate.worker_changed()
    for task in waiting:
        with pytest.raises(WorkerCrashed):
            await task
    assert bench.gate.waiting == 0
    # And who comes now does not wait either.
    with pytest.raises(WorkerCrashed):
        await through()
    await bench.ended(running)
    bench.capacity = ONE_SLOT
    assert bench.gate.describe().expected_ms == 0.0


async def test_the_rate_is_what_the_replica_really_works_off(bench, clock):
    """It said ten a second and does two: who comes later is told a wait that is true."""
    tasks = [bench.call("a", end=generated(10)) for _ in range(30)]
    await settled()
    for task in tasks[:20]:
        clock.now += 5.0
        await bench.ended(task)
    # Nine wait for ten units each, and one is half done: 47.5 s of work at two a second; for somebody else 2.5 s.
    assert bench.gate.waiting == 9
    with pytest.raises(Overloaded) as caught:
        await bench.call("a", seconds=30.0)
    waited = float(caught.value.message.split("about ")[1].split(" s")[0])
    assert waited == pytest.approx(47.5, rel=0.4)
    assert bench.gate.describe().expected_ms == pytest.approx(2500, rel=0.2)


async def test_answers_that_are_longer_than_was_thought_are_charged_to_who_had_them(bench):
    """Both ask for as many as may be; one gets ten times the other's."""
    order = []
    unbounded = CompleteParams(prompt="")
    tasks = [
        bench.call(caller, work=unbounded, end=generated(tokens))
        for _ in range(12)
        for caller, tokens in (("long", 1000), ("short", 100))
    ]
    await settled()
    by_caller = {"long": list(tasks[0::2]), "short": list(tasks[1::2])}
    for _ in range(11):
        caller = bench.inside[-1]
        order.append(caller)
        await bench.ended(by_caller[caller].pop(0))
    assert order.count("short") >= 3 * order.count("long")


async def test_texts_are_let_in_by_their_tokens_so_that_batches_stay_full(clock):
    info = LoadedInfo(
        model_kind="embedding",
        memory_bytes=1,
        load_seconds=1.0,
        max_input_tokens=256,
        speeds=MeasuredSpeeds(texts_per_second=50.0),
        tuned=TunedSettings(batch_tokens=512),
    )
    capacity = capacity_of(info, 1000)
    assert capacity.room == 512 * BATCHES_AHEAD
    assert capacity.own_word == 50.0 * SPEED_TOKENS
    bench = Bench(clock, capacity, queue_limit=1000)
    short = EmbedParams(input="x" * 256)  # 64 tokens
    tasks = [bench.call("a", work=short) for _ in range(200)]
    await settled()
    assert len(bench.inside) == 512 * BATCHES_AHEAD // 64
    for task in tasks:
        await bench.ended(task)
    # A huge call takes no more than its part, so that others still get in beside it.
    huge = [bench.call("b", work=EmbedParams(input=["x" * 4000] * 2048), seconds=1e6) for _ in range(LEAST_CALLS + 2)]
    await settled()
    assert bench.inside.count("b") == LEAST_CALLS
    assert bench.gate.waiting == 2
    for task in huge:
        await bench.ended(task)


@pytest.mark.parametrize("budget", [512, 1024, 4096])
@pytest.mark.parametrize(("callers", "texts"), [(8, 32), (60, 1)])
async def test_the_callers_of_the_engine_benchmark_all_find_room_so_that_its_batches_are_as_full(
    clock, budget, callers, texts
):
    info = LoadedInfo(
        model_kind="embedding",
        memory_bytes=1,
        load_seconds=1.0,
        max_input_tokens=256,
        tuned=TunedSettings(batch_tokens=budget),
    )
    bench = Bench(clock, capacity_of(info, 64))
    work = EmbedParams(input=["x" * 520] * texts)  # 130 tokens, the benchmark's mean
    tasks = [bench.call("a", work=work) for _ in range(callers)]
    await settled()
    assert len(bench.inside) == callers
    for task in tasks:
        await bench.ended(task)


async def test_texts_that_cannot_be_done_in_time_beside_the_others_are_refused_and_alone_they_are_tried(clock):
    """What they cost is known: 6,400 tokens, a second of all of the replica."""
    bench = Bench(clock, Capacity(100_000.0, 512.0, 100, 6400.0, 256, generates=False))
    work = EmbedParams(input=["x" * 256] * 100)
    first = bench.call("a", work=work, seconds=0.5)
    await settled()
    assert bench.inside == ["a"]
    second = bench.call("b", work=work, seconds=1.5)
    await settled()
    assert bench.inside == ["a", "b"]
    with pytest.raises(Overloaded, match=r"wait about 0\.0 s .*may take 4\.0 s beside the others"):
        await bench.call("b", work=work, seconds=1.5)
    for task in (first, second):
        await bench.ended(task)


async def test_a_worker_s_own_bound_is_never_reached_from_here(clock):
    bench = Bench(clock, Capacity(1000.0, 1000.0, 3, None, 256, generates=False))
    tasks = [bench.call("a", work=RerankParams(query="q", documents=["d"])) for _ in range(5)]
    await settled()
    assert (len(bench.inside), bench.gate.waiting) == (3, 2)
    for task in tasks:
        await bench.ended(task)
