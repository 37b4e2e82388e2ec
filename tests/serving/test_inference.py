"""`inference.*` on a fake router."""

import base64
import struct

import orjson
import pytest

from tars.core.routing import Candidate
from tars.core.types import Deadline, ModelKind, ReplicaId, ReplicaState
from tars.errors import (
    DeadlineExceeded,
    DoesNotFit,
    Draining,
    IdempotencyConflict,
    InternalError,
    WorkerCrashed,
    WrongModelKind,
)
from tars.messages.base import CallContext
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    Choice,
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    EmbedResult,
    Generated,
    Reranked,
    RerankParams,
    ServedBy,
    Timings,
    Tokenized,
    TokenizeParams,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tars.rpc.envelope import encode_result
from tars.serving.idempotency import seed_of
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
        self.served = [
            ServedModel("c", ModelKind.CHAT, ()),
            ServedModel("e", ModelKind.EMBEDDING, ()),
            ServedModel("r", ModelKind.RERANK, ()),
        ]

    def models(self):
        return self.served

    def loadable(self):
        return ()

    def candidates(self, model):
        return [Candidate(ReplicaId("r"), model, ModelKind.CHAT, ReplicaState.READY)]


class FakeRouter(Router):
    """The real name resolution, scripted events."""

    def __init__(self, *script):
        super().__init__(FakeFleet())
        self.fleet = self._fleet
        self.script = script
        self.runs = 0
        self.works = []
        self.closed = 0

    async def run(self, model, work, call):
        self.runs += 1
        self.works.append(work)
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
    assert (items[-1].model, items[-1].served_by) == ("c", SERVED.model_copy(update={"call": "t"}))


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


def on_the_wire(result):
    return orjson.loads(encode_result(1, result))["result"]


async def test_embeddings_come_as_numbers_or_as_the_workers_own_bytes():
    vector = base64.b64encode(struct.pack("<2f", 0.6, -0.8)).decode()
    inference = Inference(
        FakeRouter(
            Embedded(vectors=[vector], dimensions=2, truncated=[0], split=[1], prompt_tokens=3, timings=Timings())
        )
    )
    as_floats = on_the_wire(await inference.embed(EmbedParams(input="x"), call()))
    assert as_floats["embeddings"] == [[pytest.approx(0.6), pytest.approx(-0.8)]]
    assert (as_floats["truncated"], as_floats["split"], as_floats["dimensions"]) == ([0], [1], 2)
    assert as_floats["usage"]["prompt_tokens"] == 3
    assert EmbedResult.model_validate(as_floats).embeddings == as_floats["embeddings"]
    as_text = on_the_wire(await inference.embed(EmbedParams(input="x", encoding_format="base64"), call()))
    assert as_text["embeddings"] == [vector]


@pytest.mark.parametrize("output_type", ["int8", "binary"])
async def test_small_vectors_come_as_whole_numbers_or_as_the_workers_own_bytes(output_type):
    vector = base64.b64encode(bytes([127, 129, 0])).decode()
    router = FakeRouter(Embedded(vectors=[vector], dimensions=3, prompt_tokens=3, timings=Timings()))
    params = EmbedParams(input="x", output_type=output_type)
    said = on_the_wire(await Inference(router).embed(params, call()))
    assert said["embeddings"] == [[127, -127, 0]]
    assert EmbedResult.model_validate(said).embeddings == [[127, -127, 0]]
    params = EmbedParams(input="x", output_type=output_type, encoding_format="base64")
    assert on_the_wire(await Inference(router).embed(params, call()))["embeddings"] == [vector]


async def test_the_params_reach_the_worker_as_the_caller_gave_them():
    vector = base64.b64encode(struct.pack("<f", 1.0)).decode()
    router = FakeRouter(Embedded(vectors=[vector], dimensions=1, prompt_tokens=3, timings=Timings()))
    params = EmbedParams(input="x", dimensions=1, overflow="mean", input_type="query")
    await Inference(router).embed(params, call())
    # But for the model's name: a peer may serve several of the kind.
    assert router.works == [params.model_copy(update={"model": "e"})]


async def test_several_answers_with_reasoning_and_tool_calls_reach_the_result():
    wanted = ToolCall(id="call-1", name="weather", arguments='{"city": "Rome"}')
    other = Choice(index=1, text="other", finish_reason="length", reasoning="or", tool_calls=[])
    done = Generated(
        text="",
        finish_reason="tool_calls",
        usage=Usage(prompt_tokens=9, completion_tokens=1, total_tokens=10, cached_tokens=8),
        timings=Timings(),
        reasoning="hm",
        tool_calls=[wanted],
        seed=7,
        further=[other],
    )
    pieces = [Delta(text="", index=0, reasoning="hm"), Delta(text="other", index=1)]
    inference = Inference(FakeRouter(*pieces, done))
    first = await everything(inference.chat(CHAT, call("k")))
    assert first[:-1] == pieces
    result = first[-1]
    assert (result.message.reasoning, result.message.tool_calls) == ("hm", [wanted])
    assert (result.seed, result.usage.cached_tokens, result.further) == (7, 8, [other])
    again = await everything(inference.chat(CHAT, call("k")))
    assert again == [
        Delta(
            text="",
            reasoning="hm",
            tool_calls=[ToolCallDelta(index=0, id="call-1", name="weather", arguments='{"city": "Rome"}')],
        ),
        Delta(text="other", index=1, reasoning="or"),
        result,
    ]
    completed = await everything(inference.complete(CompleteParams(prompt="x", n=2), call()))
    assert (completed[-1].further, completed[-1].seed) == ([other], 7)


async def test_result_and_work_name_the_adapter_that_was_asked_for():
    router = FakeRouter(DONE)
    router.fleet.served = [ServedModel("c", ModelKind.CHAT, ("short", "c:latest"))]
    for asked, shown in ((None, "c"), ("c", "c"), ("short", "c"), ("c:latest", "c"), ("c:poet", "c:poet")):
        # How `name:adapter` is resolved is the router's to test.
        router.resolve = lambda name, kind: router.fleet.served[0]
        params = CHAT.model_copy(update={"model": asked})
        items = await everything(Inference(router).chat(params, call()))
        assert (items[-1].model, router.works[-1].model) == (shown, shown)


def reranked(*scores):
    return Reranked(scores=list(scores), truncated=[1], prompt_tokens=9, timings=Timings())


async def test_reranked_documents_come_best_first_and_equal_ones_in_their_order():
    inference = Inference(FakeRouter(reranked(0.2, 0.9, 0.2, 0.95)))
    documents = ["a", "b", "c", "d"]
    result = await inference.rerank(RerankParams(query="q", documents=documents), call())
    assert [(scored.index, scored.score, scored.document) for scored in result.results] == [
        (3, 0.95, None),
        (1, 0.9, None),
        (0, 0.2, None),
        (2, 0.2, None),
    ]
    assert (result.model, result.truncated, result.usage.total_tokens) == ("r", [1], 9)
    best = await inference.rerank(RerankParams(query="q", documents=documents, top_n=2, return_documents=True), call())
    assert [(scored.index, scored.document) for scored in best.results] == [(3, "d"), (1, "b")]
    most = await inference.rerank(RerankParams(query="q", documents=documents, top_n=99), call())
    assert len(most.results) == 4


async def test_a_repeated_rerank_runs_once():
    router = FakeRouter(reranked(0.5))
    inference = Inference(router)
    params = RerankParams(query="q", documents=["a"])
    assert await inference.rerank(params, call("k")) == await inference.rerank(params, call("k"))
    assert router.runs == 1


async def test_a_worker_that_scored_too_few_documents_is_a_bug_and_no_short_answer():
    with pytest.raises(InternalError):
        await Inference(FakeRouter(reranked(0.5))).rerank(RerankParams(query="q", documents=["a", "b"]), call())


async def test_a_model_of_another_kind_is_refused_with_the_name_of_a_right_one():
    inference = Inference(FakeRouter())
    with pytest.raises(WrongModelKind, match="try r"):
        await inference.rerank(RerankParams(model="e", query="q", documents=["a"]), call())
    with pytest.raises(WrongModelKind, match="try e"):
        await inference.embed(EmbedParams(model="r", input="a"), call())
    with pytest.raises(WrongModelKind, match="try c"):
        await everything(inference.chat(CHAT.model_copy(update={"model": "r"}), call()))


async def test_tokenize_counts_and_takes_a_model_of_any_kind():
    inference = Inference(FakeRouter(Tokenized(tokens=[1, 2])))
    for name in ("c", "e", "r"):
        assert (await inference.tokenize(TokenizeParams(text="x", model=name), call())).model == name
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


def kept(inference):
    """(outcome, model, call it repeats) of each record."""
    return [(each.outcome, each.model, each.repeats) for each in inference.records.find("t")]


async def test_every_call_leaves_a_record_however_it_ends():
    inference = Inference(FakeRouter(Delta(text="h"), DONE))
    await everything(inference.chat(CHAT, call()))
    running = inference.chat(CHAT, call())
    await anext(running)
    assert kept(inference)[1] == ("running", "c", "")
    await running.aclose()
    with pytest.raises(WrongModelKind):
        await inference.embed(EmbedParams(model="c", input="a"), call())
    await everything(inference.chat(CHAT, call("k")))
    await everything(inference.chat(CHAT, call("k")))
    with pytest.raises(IdempotencyConflict):
        await everything(inference.chat(CHAT.model_copy(update={"seed": 1}), call("k")))
    assert kept(inference) == [
        ("answered", "c", ""),
        ("cancelled", "c", ""),
        ("wrong_model_kind", "c", ""),
        ("answered", "c", ""),
        ("repeated", "c", "t"),
        ("idempotency_conflict", "c", ""),
    ]


async def test_embeddings_reranks_and_counts_leave_theirs_too():
    vector = base64.b64encode(struct.pack("<f", 1.0)).decode()
    for router, ask in (
        (
            FakeRouter(Embedded(vectors=[vector], dimensions=1, prompt_tokens=3, timings=Timings())),
            lambda inference: inference.embed(EmbedParams(input="x"), call("k")),
        ),
        (
            FakeRouter(reranked(0.5)),
            lambda inference: inference.rerank(RerankParams(query="q", documents=["a"]), call("k")),
        ),
        (FakeRouter(Tokenized(tokens=[1])), lambda inference: inference.tokenize(TokenizeParams(text="x"), call("k"))),
        (FakeRouter(WorkerCrashed("died")), lambda inference: inference.embed(EmbedParams(input="x"), call("k"))),
    ):
        inference = Inference(router)
        try:
            await ask(inference)
            ended = "answered"
        except WorkerCrashed:
            ended = "worker_crashed"
        assert [outcome for outcome, _, _ in kept(inference)] == [ended]


async def test_a_call_with_a_key_and_without_a_seed_gets_the_keys_own_seed():
    router = FakeRouter(DONE)
    for key, given in (("k", None), ("k2", None), (None, None), ("k3", 7)):
        await everything(Inference(router).chat(CHAT.model_copy(update={"seed": given}), call(key)))
    first, second, without, chosen = (work.seed for work in router.works)
    assert first == seed_of(call("k"))
    assert second == seed_of(call("k2")) != first
    assert without is None
    assert chosen == 7


async def test_an_attempt_that_a_peer_sent_claims_nothing_and_keeps_the_gateways_seed():
    router = FakeRouter(DONE)
    inference = Inference(router)
    for _ in range(2):
        attempt = CallContext(Deadline(1e9), "t", method="inference.chat", idempotency_key="k", hops=1, peer="n2")
        await everything(inference.chat(CHAT, attempt))
    assert [work.seed for work in router.works] == [None, None]
