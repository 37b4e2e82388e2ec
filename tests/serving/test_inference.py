"""`inference.*` on a fake router."""

import base64
import struct

import pytest

from tars.core.types import Deadline, ModelKind
from tars.errors import DeadlineExceeded, DoesNotFit, Draining, WorkerCrashed
from tars.messages.base import CallContext
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Generated,
    ServedBy,
    Timings,
    Tokenized,
    TokenizeParams,
    Usage,
)
from tars.serving.inference import Inference
from tars.serving.router import Router, ServedModel

SERVED = ServedBy(node="n", replica="r", device="d")
DONE = Generated(
    text="hello",
    finish_reason="stop",
    usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    timings=Timings(),
)
CHAT = ChatParams(messages=[ChatMessage(role="user", content="hi")])


class FakeFleet:
    def __init__(self):
        self.served = [ServedModel("c", ModelKind.CHAT, ()), ServedModel("e", ModelKind.EMBEDDING, ())]

    def models(self):
        return self.served


class FakeRouter(Router):
    """The real name resolution, scripted events."""

    def __init__(self, *script):
        super().__init__(FakeFleet())
        self.fleet = self._fleet
        self.script = script
        self.runs = 0
        self.closed = 0

    async def run(self, model, work, call):
        self.runs += 1
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                yield step, SERVED
        finally:
            self.closed += 1


def call(key=None, budget=1e9):
    return CallContext(Deadline(budget), "t", method="inference.chat", idempotency_key=key)


async def everything(stream):
    return [item async for item in stream]


async def test_chat_streams_deltas_and_ends_with_the_result():
    items = await everything(Inference(FakeRouter(Delta(text="hel"), Delta(text="lo"), DONE)).chat(CHAT, call()))
    assert [item.text for item in items[:-1]] == ["hel", "lo"]
    assert items[-1].message.content == "hello"
    assert (items[-1].model, items[-1].served_by) == ("c", SERVED)


async def test_completion_ends_with_its_own_result():
    items = await everything(Inference(FakeRouter(DONE)).complete(CompleteParams(prompt="x"), call()))
    assert items[-1].text == "hello"


async def test_a_repeated_idempotency_key_runs_once_and_streams_the_same_text():
    router = FakeRouter(Delta(text="hello"), DONE)
    inference = Inference(router)
    first = await everything(inference.chat(CHAT, call("k")))
    second = await everything(inference.chat(CHAT, call("k")))
    assert router.runs == 1
    assert "".join(item.text for item in second[:-1]) == "hello"
    assert second[-1] == first[-1]


async def test_a_failed_call_frees_its_idempotency_key():
    router = FakeRouter(WorkerCrashed("died"))
    inference = Inference(router)
    for _ in range(2):
        with pytest.raises(WorkerCrashed):
            await everything(inference.chat(CHAT, call("k")))
    assert router.runs == 2


async def test_joining_a_running_call_ends_with_the_joiners_own_deadline():
    inference = Inference(FakeRouter(Delta(text="h"), DONE), now=lambda: 0.0)
    running = inference.chat(CHAT, call("k"))
    await anext(running)
    with pytest.raises(DeadlineExceeded):
        await everything(inference.chat(CHAT, call("k", budget=0.01)))
    await running.aclose()


async def test_closing_a_chat_closes_the_work_and_frees_the_key():
    router = FakeRouter(Delta(text="h"), DONE)
    inference = Inference(router)
    running = inference.chat(CHAT, call("k"))
    await anext(running)
    await running.aclose()
    assert router.closed == 1
    assert len(await everything(inference.chat(CHAT, call("k")))) == 2


async def test_embeddings_come_as_floats_or_as_the_workers_own_bytes():
    vector = base64.b64encode(struct.pack("<2f", 0.6, -0.8)).decode()
    inference = Inference(
        FakeRouter(Embedded(vectors=[vector], dimensions=2, truncated=[0], prompt_tokens=3, timings=Timings()))
    )
    as_floats = await inference.embed(EmbedParams(input="x"), call())
    assert as_floats.embeddings == [[pytest.approx(0.6), pytest.approx(-0.8)]]
    assert (as_floats.truncated, as_floats.usage.prompt_tokens, as_floats.dimensions) == ([0], 3, 2)
    as_text = await inference.embed(EmbedParams(input="x", encoding_format="base64"), call())
    assert as_text.embeddings == [vector]


async def test_tokenize_counts_and_takes_a_model_of_any_kind():
    inference = Inference(FakeRouter(Tokenized(tokens=[1, 2])))
    assert (await inference.tokenize(TokenizeParams(text="x", model="e"), call())).model == "e"
    assert (await inference.tokenize(TokenizeParams(text="x"), call())).count == 2


async def test_tokenize_of_a_refused_model_says_why_it_was_refused_and_not_that_it_is_of_another_kind():
    router = FakeRouter(Tokenized(tokens=[1, 2]))
    router.fleet.served = [ServedModel("big", ModelKind.CHAT, (), DoesNotFit("too big"))]
    with pytest.raises(DoesNotFit):
        await Inference(router).tokenize(TokenizeParams(text="x", model="big"), call())


async def test_a_draining_node_takes_no_new_call_but_ends_the_running_one():
    inference = Inference(FakeRouter(Delta(text="h"), DONE))
    running = inference.chat(CHAT, call())
    await anext(running)
    inference.draining = True
    assert (await anext(running)).message.content == "hello"
    with pytest.raises(Draining):
        await everything(inference.chat(CHAT, call()))
    with pytest.raises(Draining):
        await inference.embed(EmbedParams(input="x"), call())
    await running.aclose()


async def test_a_refused_model_answers_with_the_plans_reason():
    router = FakeRouter(DONE)
    router.fleet.served = [ServedModel("big", ModelKind.CHAT, (), DoesNotFit("too big"))]
    with pytest.raises(DoesNotFit):
        await everything(Inference(router).chat(CHAT, call()))
    assert router.runs == 0
