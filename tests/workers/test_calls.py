from __future__ import annotations

import asyncio

import pytest

from tars.errors import DeadlineExceeded, Draining
from tars.messages.inference import CompleteParams, Delta, Tokenized, TokenLogprob, ToolCallDelta
from tars.workers.calls import BACKLOG_MOST, Call
from tars.workers.engine import Event
from tars.workers.protocol import row_of

WORK = CompleteParams(prompt="x")
END = Tokenized(tokens=[])


async def drain(call: Call) -> tuple[list[Delta], Event | Exception]:
    deltas = []
    async with asyncio.timeout(10):
        while isinstance(event := await call.next(), Delta):
            deltas.append(event)
    return deltas, event


async def test_deltas_come_in_order_before_the_end_which_stays() -> None:
    call = Call(WORK, 60, 1)
    deltas = [Delta(text=f"{n}", token_ids=[n], index=n % 2) for n in range(BACKLOG_MOST)]
    for delta in deltas:
        call.add(row_of(1, delta))
    assert call.open
    call.finish(END)
    assert await drain(call) == (deltas, END)
    assert await call.next() == END
    assert not call.open


async def test_a_reader_who_waits_is_woken_by_a_delta_and_by_the_end() -> None:
    call = Call(WORK, 60, 1)
    waiting = asyncio.create_task(call.next())
    await asyncio.sleep(0)
    call.add(row_of(1, Delta(text="a")))
    assert await waiting == Delta(text="a")
    waiting = asyncio.create_task(call.next())
    await asyncio.sleep(0)
    call.fail(Draining("moved"))
    assert isinstance(await waiting, Draining)
    assert call.open, "the worker has not ended it: it has to be cancelled there"


async def test_the_first_end_counts() -> None:
    call = Call(WORK, 60, 1)
    call.fail(Draining("moved"))
    call.finish(END)
    assert isinstance(await call.next(), Draining)


async def test_the_time_budget_ends_a_call_behind_what_came_in_time() -> None:
    call = Call(WORK, 0.02, 1)
    call.add(row_of(1, Delta(text="a")))
    deltas, end = await drain(call)
    assert deltas == [Delta(text="a")]
    assert isinstance(end, DeadlineExceeded)
    assert call.open


@pytest.mark.parametrize("answers", [1, 3])
async def test_a_slow_reader_gets_the_same_in_fewer_pieces(answers: int) -> None:
    call = Call(WORK, 60, answers)
    count = 16 * BACKLOG_MOST
    for n in range(count):
        for index in range(answers):
            logprob = TokenLogprob(token="é", token_id=n, logprob=-1.0, top=[("é", -1.0)])
            calls = [ToolCallDelta(index=0, arguments="{")] if n == count - 1 else []
            delta = Delta(text=f"{n} ", token_ids=[n], index=index, logprobs=[logprob], reasoning="r", tool_calls=calls)
            call.add(row_of(1, delta if n % 2 else Delta(text=f"{n} ", token_ids=[n], index=index)))
    call.add(row_of(1, Delta(text="", ended=True)))
    call.finish(END)
    deltas, end = await drain(call)
    assert end == END
    assert len(deltas) <= BACKLOG_MOST + answers
    for index in range(answers):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == "".join(f"{n} " for n in range(count))
        assert [token for delta in mine for token in delta.token_ids] == list(range(count))
        assert [one.token_id for delta in mine for one in delta.logprobs or ()] == list(range(1, count, 2))
        assert "".join(delta.reasoning for delta in mine) == "r" * (count // 2)
        assert sum(len(delta.tool_calls) for delta in mine) == 1
        assert any(delta.ended for delta in mine) == (index == 0)
