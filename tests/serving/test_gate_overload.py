"""The real gate under 1, 2 and 5 times what its replica can do, on virtual time: an engine of a known speed, callers who do not wait.

The same as `scripts/bench overload`, without a machine whose own speed changes: what the gate decides shows, and nothing else.
"""

import asyncio
import random
import selectors
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from tars.core.types import Deadline
from tars.errors import Overloaded
from tars.messages.base import CallContext
from tars.messages.inference import CompleteParams, Embedded, EmbedParams, Generated, Timings, Usage
from tars.serving.call_costs import Capacity
from tars.serving.gate import Gate

SLOTS, SPEED, TOKENS = 4, 400.0, 20
"""Tokens a second of all slots together; of an answer on the average, exponentially distributed."""
CAPACITY = SPEED / TOKENS
TEXT_SPEED = 20_000.0
"""Tokens a second of texts; a call has 1,600 on the average."""
DEADLINE = 2.0
SECONDS = 20.0


class VirtualSelector(selectors.SelectSelector):
    """Nothing is waited for: the time that would pass has passed."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        if timeout is not None and timeout > 0:
            self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.selector = VirtualSelector()
        super().__init__(self.selector)

    def time(self):
        return self.selector.now


class Engine:
    """One token for each of at most `SLOTS` answers in each step; the rest waits in order. A step takes its time, however few run."""

    def __init__(self):
        self.waiting = deque()
        self.running = []

    def submit(self, tokens, on_end):
        answer = [tokens, tokens, on_end]
        self.waiting.append(answer)
        return answer

    def cancel(self, answer):
        if answer in self.waiting:
            self.waiting.remove(answer)
        elif answer in self.running:
            self.running.remove(answer)

    async def run(self):
        while True:
            await asyncio.sleep(SLOTS / SPEED)
            while self.waiting and len(self.running) < SLOTS:
                self.running.append(self.waiting.popleft())
            for answer in list(self.running):
                answer[0] -= 1
                if not answer[0]:
                    self.running.remove(answer)
                    answer[2](answer[1])


class TextEngine:
    """All calls that it has share its speed evenly, as the embedding engine lets them take turns."""

    def __init__(self):
        self.running = []

    def submit(self, tokens, on_end):
        answer = [tokens, tokens, on_end]
        self.running.append(answer)
        return answer

    def cancel(self, answer):
        if answer in self.running:
            self.running.remove(answer)

    async def run(self):
        step = 0.01
        while True:
            await asyncio.sleep(step)
            each = TEXT_SPEED * step / max(1, len(self.running))
            for answer in list(self.running):
                answer[0] -= each
                if answer[0] <= 0:
                    self.running.remove(answer)
                    answer[2](answer[1])


@dataclass
class Tally:
    sent: Counter = field(default_factory=Counter)
    answered: Counter = field(default_factory=Counter)
    late: int = 0
    refused_after: list = field(default_factory=list)
    tokens: int = 0


def run(rates, own_word=5 * SPEED, seed=1, seconds=SECONDS, texts=False):
    """What came of calls that came at these rates; `own_word`: what the replica claims to do."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(_run(loop, rates, own_word, random.Random(seed), seconds, texts))
    finally:
        loop.close()


def tokens_and_work(dice, texts):
    """Of a call for texts they are known when it comes; of a generation nobody knows them before it ended."""
    if not texts:
        return max(1, round(dice.expovariate(1 / TOKENS))), CompleteParams(prompt="")
    count = 1 + int(dice.expovariate(1 / 15))
    return count * 100.0, EmbedParams(input=["x" * 400] * count)


def ending(texts, count):
    if texts:
        return Embedded(vectors=[], dimensions=1, prompt_tokens=int(count), timings=Timings())
    usage = Usage(prompt_tokens=0, completion_tokens=count, total_tokens=count)
    return Generated(text="", finish_reason="stop", usage=usage, timings=Timings())


async def _run(loop, rates, own_word, dice, seconds, texts):
    capacity = Capacity(SLOTS + 1, SLOTS, 100, own_word)
    if texts:
        capacity = Capacity(8192.0, 512.0, 65, own_word, 256, generates=False)
    gate = Gate(lambda: capacity, 64, loop.time, random.Random(2))
    engine, tally = TextEngine() if texts else Engine(), Tally()
    working = asyncio.create_task(engine.run())

    async def call(caller):
        tally.sent[caller] += 1
        began = loop.time()
        tokens, work = tokens_and_work(dice, texts)
        priority = "batch" if caller == "batch" else None
        context = CallContext(Deadline(began + DEADLINE), "t", caller=caller, priority=priority)
        try:
            async with asyncio.timeout(DEADLINE), gate.turn(context, work) as turn:
                done = loop.create_future()

                def ended(count):
                    turn.ended(ending(texts, count))
                    done.set_result(None)

                answer = engine.submit(tokens, ended)
                try:
                    await done
                finally:
                    turn.tokens = answer[1] - answer[0]
                    engine.cancel(answer)
        except Overloaded:
            tally.refused_after.append(loop.time() - began)
        except TimeoutError:
            tally.late += 1
        else:
            tally.answered[caller] += 1
            tally.tokens += tokens

    async def sends(caller, rate):
        while loop.time() < seconds:
            await asyncio.sleep(dice.expovariate(rate))
            calls.append(asyncio.create_task(call(caller)))

    calls = []
    await asyncio.gather(*(sends(caller, rate) for caller, rate in rates.items()))
    await asyncio.gather(*calls)
    working.cancel()
    assert gate.waiting == 0
    return tally


def rates(factor, capacity=CAPACITY):
    """A greedy caller, a modest one below the fair share, and a batch job: as `scripts/bench overload` has them."""
    modest, batch = 0.2 * capacity, 0.5 * capacity
    return {"modest": modest, "batch": batch, "greedy": factor * capacity - modest - batch}


@pytest.mark.parametrize(
    ("factor", "own_word"),
    [
        (1.0, 5 * SPEED),
        (2.0, 5 * SPEED),
        (5.0, 5 * SPEED),
        pytest.param(2.0, SPEED / 3, marks=pytest.mark.slow),
        pytest.param(5.0, SPEED / 3, marks=pytest.mark.slow),
        pytest.param(5.0, None, marks=pytest.mark.slow),
    ],
)
def test_throughput_stays_flat_whatever_comes(factor, own_word):
    tally = run(rates(factor), own_word)
    assert tally.tokens >= 0.9 * SPEED * SECONDS
    # Of exponentially distributed answers some take longer than anybody can have expected.
    assert tally.late <= 0.05 * tally.answered.total()
    refused_after = sorted(tally.refused_after)
    assert refused_after[len(refused_after) // 2] <= 0.05, "at once"
    assert tally.answered["modest"] >= 0.95 * tally.sent["modest"]
    assert tally.answered["batch"] >= 0.05 * tally.answered.total()


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_texts_stay_flat_too(factor):
    tally = run(rates(factor, TEXT_SPEED / 1600), 3 * TEXT_SPEED, texts=True)
    assert tally.tokens >= 0.85 * TEXT_SPEED * SECONDS
    assert tally.late <= 0.05 * tally.answered.total()
    # The largest calls cannot be done in time beside others, whoever sends them.
    assert tally.answered["modest"] >= 0.6 * tally.sent["modest"]
    assert tally.answered["batch"] >= 0.03 * tally.answered.total()


@pytest.mark.slow
def test_a_caller_who_is_alone_has_all_of_the_replica():
    tally = run({"only": 5 * CAPACITY})
    assert tally.tokens >= 0.9 * SPEED * SECONDS


@pytest.mark.slow
def test_two_greedy_callers_get_the_same_share_of_the_tokens_whatever_they_send():
    tally = run({"greedy": 2 * CAPACITY, "greedier": 6 * CAPACITY})
    assert tally.answered["greedy"] == pytest.approx(tally.answered["greedier"], rel=0.25)
