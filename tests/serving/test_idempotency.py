"""Idempotency keys."""

import asyncio

import pytest

from tars.core.types import Deadline
from tars.errors import IdempotencyConflict
from tars.messages.base import CallContext
from tars.messages.inference import TokenizeParams, TokenizeResult
from tars.serving.idempotency import KEEP_BYTES, KEEP_SECONDS, Claim, IdempotentAnswers

PARAMS = TokenizeParams(text="a")
ANSWER = TokenizeResult(model="m", tokens=[1], count=1)


def call(key="k", caller="local"):
    return CallContext(Deadline(1e9), "trace", method="inference.tokenize", idempotency_key=key, caller=caller)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def answers(clock):
    return IdempotentAnswers(clock)


async def test_a_repeated_key_gets_the_first_calls_answer(answers):
    claim = await answers.claim_or_answer(call(), PARAMS)
    claim.succeed(ANSWER, 100)
    claim.fail()
    assert await answers.claim_or_answer(call(), PARAMS) == ANSWER


async def test_a_call_without_a_key_always_runs(answers):
    for _ in range(2):
        claim = await answers.claim_or_answer(call(key=None), PARAMS)
        assert isinstance(claim, Claim)
        claim.succeed(ANSWER, 100)


async def test_a_second_call_joins_the_first_while_it_runs(answers):
    claim = await answers.claim_or_answer(call(), PARAMS)
    joined = asyncio.create_task(answers.claim_or_answer(call(), PARAMS))
    await asyncio.sleep(0)
    assert not joined.done()
    claim.succeed(ANSWER, 100)
    assert await joined == ANSWER


async def test_after_a_failure_one_of_those_who_joined_takes_over(answers):
    claim = await answers.claim_or_answer(call(), PARAMS)
    joined = [asyncio.create_task(answers.claim_or_answer(call(), PARAMS)) for _ in range(2)]
    await asyncio.sleep(0)
    claim.fail()
    done, waiting = await asyncio.wait(joined, return_when=asyncio.FIRST_COMPLETED, timeout=1)
    assert len(done) == len(waiting) == 1
    (second,) = done
    second.result().succeed(ANSWER, 100)
    assert await waiting.pop() == ANSWER


async def test_another_body_under_the_same_key_is_refused(answers):
    await answers.claim_or_answer(call(), PARAMS)
    with pytest.raises(IdempotencyConflict):
        await answers.claim_or_answer(call(), TokenizeParams(text="b"))


async def test_two_callers_do_not_share_keys(answers):
    (await answers.claim_or_answer(call(caller="a"), PARAMS)).succeed(ANSWER, 100)
    assert isinstance(await answers.claim_or_answer(call(caller="b"), PARAMS), Claim)


async def test_an_answer_is_forgotten_after_its_time(answers, clock):
    (await answers.claim_or_answer(call(), PARAMS)).succeed(ANSWER, 100)
    clock.now = KEEP_SECONDS + 1
    assert isinstance(await answers.claim_or_answer(call(), PARAMS), Claim)


async def test_large_answers_push_the_oldest_out_not_the_newest(answers):
    for number in range(3):
        (await answers.claim_or_answer(call(f"k{number}"), PARAMS)).succeed(ANSWER, KEEP_BYTES // 2)
    (await answers.claim_or_answer(call("small"), PARAMS)).succeed(ANSWER, 1)
    assert isinstance(await answers.claim_or_answer(call("k0"), PARAMS), Claim)
    assert await answers.claim_or_answer(call("k2"), PARAMS) == ANSWER
    assert await answers.claim_or_answer(call("small"), PARAMS) == ANSWER
