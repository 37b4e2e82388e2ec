"""Peers that fall silent, with a clock that the test moves and pings that it answers."""

import asyncio

import pytest

from tars.core.pulse import FIRST, INITIAL_TIMEOUT, INTERVAL, TIMEOUT_LEAST
from tars.core.types import NodeId
from tars.errors import BadPeerAnswer, DeadlineExceeded, NotAMember, Overloaded, PeerUnreachable
from tars.serving.lifeline import LineCut
from tars.serving.peer_pulses import DEAD, SILENT, PeerPulses

BIG, SMALL = NodeId("big"), NodeId("small")


class Bench:
    """`PeerPulses` whose time is `now`: `to` moves it in steps and lets what is due happen, without a real wait."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.frozen = set()
        self.says = None
        self.pings = []
        self.told = []
        self.thawed = asyncio.Event()
        self.pulses = PeerPulses(
            self.ping,
            silent=lambda node: self.told.append(("silent", node)),
            heard=lambda node: self.told.append(("heard", node)),
            now=lambda: self.now,
        )
        self.timers = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self.call_later)

    def call_later(self, delay, callback, *arguments):
        handle = asyncio.TimerHandle(self.now + delay, callback, arguments, asyncio.get_running_loop())
        self.timers.append(handle)
        return handle

    async def ping(self, node):
        self.pings.append((self.now, node))
        while node in self.frozen:
            self.thawed.clear()
            await self.thawed.wait()
        if self.says is not None:
            raise self.says
        return "pong"

    def thaw(self, node):
        self.frozen.discard(node)
        self.thawed.set()

    async def to(self, until):
        while self.now < until - 1e-9:
            self.now = min(until, self.now + 0.01)
            for handle in [each for each in self.timers if each.when() <= self.now]:
                self.timers.remove(handle)
                if not handle.cancelled():
                    handle._run()
            for _ in range(4):
                await asyncio.sleep(0)


@pytest.fixture
async def bench(monkeypatch):
    made = Bench(monkeypatch)
    yield made
    made.thaw(BIG)
    await made.pulses.close()


async def never():
    await asyncio.Event().wait()


async def test_a_peer_that_freezes_has_its_calls_broken_and_is_usable_at_its_first_word(bench):
    line = bench.pulses.lifeline(BIG)
    line.watch.call_began()
    waiting = asyncio.ensure_future(line.hold(never()))
    await bench.to(3.0)
    assert not waiting.done()
    assert len(bench.pings) == 6
    bench.frozen.add(BIG)
    await bench.to(3.0 + INTERVAL + TIMEOUT_LEAST + 0.05)
    with pytest.raises(LineCut):
        await waiting
    line.watch.call_ended()
    assert (line.why, line.dead) == (SILENT, False)
    assert bench.told == [("silent", BIG)]
    assert bench.pulses.is_silent(BIG)
    assert bench.pulses.times_silent == 1
    await bench.to(60.0)
    assert len(bench.told) == 1
    bench.thaw(BIG)
    await bench.to(60.02)
    assert bench.told == [("silent", BIG), ("heard", BIG)]
    assert line.why is None
    assert bench.pulses.lifeline(BIG) is line
    asked = len(bench.pings)
    await bench.to(70.0)
    assert len(bench.pings) == asked, "nobody waits for it"


async def test_what_nobody_else_can_take_stays_until_another_replica_comes(bench):
    line, others = bench.pulses.lifeline(BIG), []
    line.watch.call_began()
    waiting = asyncio.ensure_future(line.hold(never(), lambda: bool(others)))
    bench.frozen.add(BIG)
    await bench.to(10.0)
    assert bench.pulses.is_silent(BIG)
    assert not waiting.done()
    others.append("another replica")
    await bench.to(10.0 + INTERVAL + 0.02)
    with pytest.raises(LineCut):
        await waiting


async def test_one_pulse_for_a_peer_however_many_calls_and_one_for_each_peer(bench):
    for node in (BIG, SMALL):
        for _ in range(20):
            bench.pulses.lifeline(node).watch.call_began()
    await bench.to(5.0)
    assert sorted(node for _, node in bench.pings) == [BIG] * 10 + [SMALL] * 10
    bench.frozen.add(BIG)
    await bench.to(7.0)
    assert bench.told == [("silent", BIG)]
    assert bench.pulses.lifeline(SMALL).why is None


@pytest.mark.parametrize(
    ("says", "lives"),
    [
        (Overloaded("full"), True),
        (PeerUnreachable("no way"), False),
        (DeadlineExceeded("late"), False),
        (NotAMember("another one"), False),
        (BadPeerAnswer("nonsense"), True),
    ],
)
async def test_whatever_the_node_itself_says_is_a_sign_of_life_and_nothing_else_is(bench, says, lives):
    bench.says = says
    bench.pulses.lifeline(BIG).watch.call_began()
    await bench.to(FIRST + INITIAL_TIMEOUT + 0.05)
    assert bench.pulses.is_silent(BIG) != lives


async def test_tokens_are_signs_of_life(bench):
    bench.frozen.add(BIG)
    line = bench.pulses.lifeline(BIG)
    line.watch.call_began()
    for step in range(30):
        await bench.to(0.3 * (step + 1))
        line.watch.heard()
    assert not bench.told
    await bench.to(9.0 + INTERVAL + INITIAL_TIMEOUT + 0.05)
    assert bench.told == [("silent", BIG)]


async def test_who_is_dead_is_asked_no_more_and_starts_anew_when_it_is_back(bench):
    line = bench.pulses.lifeline(BIG)
    line.watch.call_began()
    bench.frozen.add(BIG)
    await bench.to(2.0)
    assert bench.pulses.is_silent(BIG)
    bench.pulses.died(BIG)
    bench.pulses.died(SMALL)
    asked = len(bench.pings)
    await bench.to(9.0)
    assert len(bench.pings) == asked
    assert (line.why, line.dead) == (DEAD, True)
    line.watch.call_ended()
    again = bench.pulses.lifeline(BIG)
    assert again is not line
    assert again.why is None
    assert not bench.pulses.is_silent(BIG)


async def test_closing_ends_all_pings(bench):
    bench.frozen.add(BIG)
    bench.pulses.lifeline(BIG).watch.call_began()
    await bench.to(1.0)
    assert any(task.get_coro().__name__ == "_ask" for task in asyncio.all_tasks())
    await bench.pulses.close()
    assert not any(task.get_coro().__name__ == "_ask" for task in asyncio.all_tasks())
