"""What calls at a peer hang on."""

import asyncio

import pytest

from tars.serving.lifeline import LAST_WORDS_SECONDS, Lifeline, LineCut


async def forever(cancelled):
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.set()


async def value(of):
    return of


async def test_what_waits_is_broken_at_once_and_cancelled():
    line, cancelled = Lifeline(), asyncio.Event()
    waiting = asyncio.create_task(line.hold(forever(cancelled)))
    await asyncio.sleep(0)
    line.cut("is dead", dead=True)
    with pytest.raises(LineCut):
        await asyncio.wait_for(waiting, LAST_WORDS_SECONDS / 2)
    assert cancelled.is_set()


async def test_what_came_before_the_cut_is_still_given_and_what_does_not_come_is_not_waited_for():
    line, cancelled = Lifeline(), asyncio.Event()
    line.cut("is dead", dead=True)
    assert await line.hold(value(7)) == 7
    with pytest.raises(LineCut):
        await asyncio.wait_for(line.hold(forever(cancelled)), LAST_WORDS_SECONDS + 5)


async def test_a_line_that_is_held_again_waits_as_before_but_never_one_to_the_dead():
    line, cancelled = Lifeline(), asyncio.Event()
    line.cut("says nothing", dead=False)
    line.restore()
    assert line.why is None
    waiting = asyncio.create_task(line.hold(forever(cancelled)))
    await asyncio.sleep(0)
    line.cut("is dead", dead=True)
    line.restore()
    assert line.why == "is dead"
    with pytest.raises(LineCut):
        await waiting


async def test_a_time_out_of_the_callers_own_stays_one():
    async def late():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await Lifeline().hold(late())


async def test_only_what_came_is_a_sign_of_life():
    class Watch:
        heard_times = 0

        def call_began(self):
            raise AssertionError

        call_ended = call_began

        def heard(self):
            self.heard_times += 1

    async def broken():
        raise KeyError("k")

    watch = Watch()
    line = Lifeline(watch)
    await line.hold(value(1))
    with pytest.raises(KeyError):
        await line.hold(broken())
    assert watch.heard_times == 1


async def test_a_call_that_nobody_else_can_take_stays_with_a_silent_peer_until_somebody_can():
    line, cancelled, others = Lifeline(), asyncio.Event(), []
    before = asyncio.create_task(line.hold(forever(cancelled), lambda: bool(others)))
    await asyncio.sleep(0)
    line.cut("says nothing", dead=False)
    assert not line.broken_for(lambda: bool(others))
    after = asyncio.create_task(line.hold(forever(cancelled), lambda: bool(others)))
    await asyncio.wait({before, after}, timeout=LAST_WORDS_SECONDS / 5)
    assert not before.done()
    assert not after.done()
    others.append("one")
    line.sweep()
    for waiting in (before, after):
        with pytest.raises(LineCut):
            await asyncio.wait_for(waiting, LAST_WORDS_SECONDS / 2)


async def test_a_sweep_of_a_line_that_holds_breaks_nothing_and_of_the_dead_all_is_broken():
    line, cancelled = Lifeline(), asyncio.Event()
    waiting = asyncio.create_task(line.hold(forever(cancelled), lambda: False))
    await asyncio.sleep(0)
    line.sweep()
    assert not waiting.done()
    line.cut("is dead", dead=True)
    with pytest.raises(LineCut):
        await asyncio.wait_for(waiting, 5)
