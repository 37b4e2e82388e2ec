"""One call at one peer, over a connection that the test holds; the real one is in test_mesh_routing and test_mesh_routing_tls."""

import asyncio
from contextlib import aclosing

import orjson
import pytest

from tars.core.types import Deadline
from tars.errors import (
    BadPeerAnswer,
    DeadlineExceeded,
    InvalidParams,
    MethodNotFound,
    NotAMember,
    Overloaded,
    PeerUnreachable,
    Unauthorized,
)
from tars.messages.base import CallContext, CallMeta, ResumeMeta
from tars.messages.inference import (
    ChatMessage,
    ChatParams,
    CompleteParams,
    Delta,
    Embedded,
    EmbedParams,
    Reranked,
    RerankParams,
    ServedBy,
    Tokenized,
    TokenizeParams,
)
from tars.rpc.http_client import NodeNotReachable
from tars.serving.lifeline import Lifeline
from tars.serving.peer_target import (
    NEVER_SENT,
    SHARE_MOST_SECONDS,
    SHARE_PART,
    PeerTarget,
    finished_of,
    meta_of,
)
from tars.workers.engine import SaveParams

TRACE = "0af7651916cd43dd8448eb211c80319c"
CHAT = ChatParams(messages=[ChatMessage(role="user", content="hi")], model="m")
SERVED = {"node": "big", "replica": "m@big#1", "device": "card", "simulated": False, "attempts": [], "calls_left": 3}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cached_tokens": 0}
COMMON = {"model": "m", "usage": USAGE, "timings": {}, "served_by": SERVED}
ANSWER = {**COMMON, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
VECTORS = {**COMMON, "embeddings": ["AACAPw==", "AAAAQA=="], "dimensions": 1, "truncated": [], "split": []}


class Connection:
    """Gives what it is told; an exception is raised in its place."""

    def __init__(self, *script):
        self.script = script
        self.asked = []
        self.closed = False
        self.read_to_its_end = False

    async def call(self, method, params=None, *, timeout=None, **meta):
        self.asked.append((method, params, timeout, meta))
        (step,) = self.script
        if isinstance(step, BaseException):
            raise step
        return step

    async def stream(self, method, params=None, *, timeout=None, **meta):
        self.asked.append((method, params, timeout, meta))
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                yield step
            self.read_to_its_end = True
        finally:
            self.closed = True


def call(seconds=10.0, **more):
    return CallContext(Deadline(seconds), more.pop("trace_id", TRACE), "inference.chat", **more)


async def test_a_peer_is_told_the_file_that_a_text_is_to_be_computed_from():
    def one(connection):
        who = ServedBy(node="big", replica="r", device="card")
        return PeerTarget(who, "big-pc", connection, now=lambda: 0.0, file_sha256="ab")

    chats, texts = Connection((None, ANSWER)), Connection(VECTORS)
    async for _ in one(chats).run(CHAT, call()):
        pass
    async for _ in one(texts).run(EmbedParams(input=["a", "b"], model="m"), call()):
        pass
    assert chats.asked[0][3]["file_sha256"] == "ab"
    assert "file_sha256" not in texts.asked[0][3], "vectors are not continued"


def target(connection):
    return PeerTarget(ServedBy(node="big", replica="m@big#0", device="card"), "big-pc", connection, now=lambda: 0.0)


async def events(work, *script, **more):
    connection = Connection(*script)
    one = target(connection)
    return [event async for event in one.run(work, call(**more))], one, connection


async def test_a_stream_becomes_a_workers_events():
    found, one, connection = await events(
        CHAT, ("inference.delta", {"text": "h", "token_ids": [5]}), ("unknown.news", {}), (None, ANSWER)
    )
    assert found[0] == Delta(text="h", token_ids=[5])
    assert (found[1].text, found[1].finish_reason) == ("hi", "stop")
    assert connection.read_to_its_end, "its connection would be closed, and the next call shake hands anew"
    assert (one.served_by.replica, one.served_by.calls_left) == ("m@big#1", 3), "who really answered"
    ((method, params, _, meta),) = connection.asked
    assert method == "inference.chat"
    assert params == {"messages": [{"role": "user", "content": "hi"}], "model": "m"}
    assert meta["hops"] == 1


async def test_begun_answers_travel_with_the_call():
    connection = Connection((None, ANSWER))
    resume = ResumeMeta(answers=[[1, 2**31]], seed=7)
    assert [event async for event in target(connection).run(CHAT, call(), resume)]
    meta = connection.asked[0][3]
    assert CallMeta.model_validate(orjson.loads(orjson.dumps(meta))).resume == resume
    _, _, fresh = await events(CHAT, (None, ANSWER))
    assert "resume" not in fresh.asked[0][3]


async def test_the_peer_is_told_whose_call_it_is_and_how_urgent():
    _, _, connection = await events(CHAT, (None, ANSWER), caller="x" * 300, priority="batch")
    assert (connection.asked[0][3]["caller"], connection.asked[0][3]["priority"]) == ("x" * 200, "batch")
    _, _, connection = await events(CHAT, (None, ANSWER))
    assert "priority" not in connection.asked[0][3]


async def test_a_piece_of_an_answer_that_was_not_asked_for_is_a_broken_peer():
    for index in (1, -1):
        with pytest.raises(PeerUnreachable, match="does not understand"):
            await events(CHAT, ("inference.delta", {"text": "h", "index": index}), (None, ANSWER))


async def test_completion_embedding_reranking_and_tokens():
    completed = {**COMMON, "text": "there was", "finish_reason": "length"}
    (done,), _, connection = await events(CompleteParams(prompt="once", model="m"), (None, completed))
    assert (done.text, done.finish_reason, connection.asked[0][0]) == ("there was", "length", "inference.complete")
    (embedded,), _, connection = await events(EmbedParams(input=["a", "b"], model="m"), VECTORS)
    assert isinstance(embedded, Embedded)
    assert embedded.vectors is not None
    assert embedded.vectors == ["AACAPw==", "AAAAQA=="]
    assert connection.asked[0][1]["encoding_format"] == "base64"
    scored = [{"index": 1, "score": 0.9}, {"index": 0, "score": 0.2}]
    work = RerankParams(query="q", documents=["a", "b"], top_n=1, return_documents=True, model="m")
    (reranked,), _, connection = await events(work, {**COMMON, "results": scored, "truncated": [1]})
    assert isinstance(reranked, Reranked)
    assert (reranked.scores, reranked.truncated) == ([0.2, 0.9], [1])
    assert not {"top_n", "return_documents"} & connection.asked[0][1].keys()
    (counted,), _, _ = await events(TokenizeParams(text="x", model="m"), {"model": "m", "tokens": [1, 2], "count": 2})
    assert counted == Tokenized(tokens=[1, 2])


@pytest.mark.parametrize(("left", "kept"), [(100.0, SHARE_MOST_SECONDS), (1.0, SHARE_PART), (0.01, 0.01 * SHARE_PART)])
async def test_the_hop_keeps_a_share_of_the_time(left, kept):
    _, _, connection = await events(CHAT, (None, ANSWER), seconds=left)
    assert connection.asked[0][2] == pytest.approx(left - kept)


async def test_a_call_without_time_is_not_sent():
    with pytest.raises(DeadlineExceeded):
        await events(CHAT, (None, ANSWER), seconds=0.0)


async def test_the_trace_goes_on_with_a_span_of_its_own():
    spans = {meta_of(call(), f"r{number}")["traceparent"] for number in range(3)}
    assert len(spans) == 3
    assert all(span.startswith(f"00-{TRACE}-") and span.endswith("-01") and len(span) == 55 for span in spans)
    for trace_id in ("trace", "0" * 32, TRACE.upper()):
        assert "traceparent" not in meta_of(call(trace_id=trace_id), "r")


async def test_an_attempt_at_a_peer_carries_no_key_for_the_call_has_its_claim_here():
    assert "idempotency_key" not in meta_of(call(idempotency_key="k", caller="alice"), "r")


def test_the_kind_of_a_call_that_was_never_sent_is_the_clients():
    assert NodeNotReachable.kind == NEVER_SENT


async def test_a_peer_that_takes_no_connection_was_never_sent_the_call():
    for work in (CHAT, EmbedParams(input="x")):
        with pytest.raises(PeerUnreachable, match="big-pc takes no connection") as met:
            await events(work, NodeNotReachable("nothing at http://10.0.0.7:8001"))
        assert met.value.details == {"peer": "big", "sent": False}
        assert met.value.kind == "peer_unreachable"
        assert "10.0.0.7" not in met.value.message


async def test_a_stream_that_breaks_says_whether_something_had_come():
    with pytest.raises(PeerUnreachable, match="broke before an answer came") as before:
        await events(CHAT, PeerUnreachable("broken"))
    assert before.value.details == {"peer": "big", "partial": False}
    with pytest.raises(PeerUnreachable, match="broke after a part") as after:
        await events(CHAT, ("inference.delta", {"text": "h"}), PeerUnreachable("broken"))
    assert after.value.details["partial"]
    with pytest.raises(PeerUnreachable, match="broke after a part"):
        await events(CHAT, ("inference.delta", {"text": "h"}))


@pytest.mark.parametrize(
    "error", [Overloaded("full", retry_after_ms=5), InvalidParams("no such tool"), DeadlineExceeded("x")]
)
async def test_what_the_peer_says_of_the_call_is_passed_on(error):
    with pytest.raises(type(error)) as met:
        await events(CHAT, error)
    assert met.value is error


@pytest.mark.parametrize(
    "error", [Unauthorized("?"), NotAMember("?"), MethodNotFound("?"), BadPeerAnswer("a proxy's page")]
)
async def test_what_is_between_the_nodes_is_not_the_callers_fault(error):
    with pytest.raises(PeerUnreachable, match="big-pc does not take this node's calls") as met:
        await events(CHAT, error)
    assert met.value.retryable


@pytest.mark.parametrize(
    ("work", "result"),
    [
        (CHAT, None),
        (CHAT, []),
        (CHAT, {}),
        (CHAT, {**ANSWER, "message": "hi"}),
        (CHAT, {**ANSWER, "surprise": 1}),
        (CHAT, {**ANSWER, "served_by": {"node": 7}}),
        (EmbedParams(input=["a", "b"]), {**VECTORS, "embeddings": ["AACAPw=="]}),
        (EmbedParams(input=["a", "b"]), {**VECTORS, "embeddings": [[1.0], [2.0]]}),
        (EmbedParams(input=["a", "b"]), {**VECTORS, "usage": None}),
        (EmbedParams(input=["a", "b"]), {"embeddings": []}),
        (RerankParams(query="q", documents=["a"]), {**COMMON, "results": [], "truncated": []}),
        (
            RerankParams(query="q", documents=["a"]),
            {**COMMON, "results": [{"index": 4, "score": 0.5}], "truncated": []},
        ),
        (TokenizeParams(text="x"), {"model": "m", "tokens": ["a"], "count": 1}),
    ],
)
async def test_an_answer_that_is_none_is_the_peers_fault_and_another_is_asked(work, result):
    script = (None, result) if isinstance(work, ChatParams) else result
    with pytest.raises(PeerUnreachable, match="does not understand"):
        await events(work, script)


async def test_a_delta_that_is_none_likewise():
    with pytest.raises(PeerUnreachable, match="does not understand"):
        await events(CHAT, ("inference.delta", {"text": 7}), (None, ANSWER))


async def test_closing_it_closes_the_stream():
    connection = Connection(("inference.delta", {"text": "h"}), (None, ANSWER))
    async with aclosing(target(connection).run(CHAT, call())) as running:
        await anext(running)
        assert not connection.closed
    assert connection.closed


async def test_cancelling_it_cancels_the_call():
    cancelled = asyncio.Event()

    class Slow(Connection):
        async def call(self, method, params=None, *, timeout=None, **meta):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    async def run():
        async for _ in target(Slow()).run(EmbedParams(input="x"), call()):
            pass

    running = asyncio.create_task(run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert cancelled.is_set()


@pytest.mark.parametrize("work", [CHAT, EmbedParams(input="x", model="m")])
async def test_when_the_peer_is_given_up_those_who_wait_for_it_hear_it_at_once(work):
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    class Frozen(Connection):
        async def call(self, method, params=None, *, timeout=None, **meta):
            waiting.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async def stream(self, method, params=None, *, timeout=None, **meta):
            yield None, await self.call(method)

    lifeline = Lifeline()
    frozen = PeerTarget(ServedBy(node="big", replica="r", device="card"), "big-pc", Frozen(), lifeline, lambda: 0.0)
    running = asyncio.create_task(anext(frozen.run(work, call())))
    await waiting.wait()
    lifeline.cut("is dead", dead=True)
    lifeline.cut("is dead", dead=True)
    with pytest.raises(PeerUnreachable, match="big-pc is dead") as caught:
        await asyncio.wait_for(running, 5)
    assert caught.value.details == {"peer": "big", "dead": True, "sent": True, "partial": False}
    assert cancelled.is_set()
    assert not lifeline._waits
    with pytest.raises(PeerUnreachable, match="big-pc is dead") as caught:
        await anext(frozen.run(work, call()))
    assert caught.value.details == {"peer": "big", "dead": True, "sent": False}, "nothing is sent on a line that is cut"


async def test_a_silent_peer_is_no_dead_one_and_gets_calls_again_once_it_is_heard():
    lifeline = Lifeline()
    connection = Connection(("inference.delta", {"text": "h"}), (None, ANSWER))
    one = PeerTarget(ServedBy(node="big", replica="r", device="card"), "big-pc", connection, lifeline, lambda: 0.0)
    lifeline.cut("says nothing", dead=False)
    with pytest.raises(PeerUnreachable, match="big-pc says nothing") as caught:
        await anext(one.run(CHAT, call()))
    assert caught.value.details == {"peer": "big", "silent": True, "sent": False}
    assert not connection.asked
    lifeline.restore()
    assert [each async for each in one.run(CHAT, call())][-1].text == "hi"


async def test_a_call_that_only_a_silent_peer_can_answer_is_sent_all_the_same():
    lifeline = Lifeline()
    lifeline.cut("says nothing", dead=False)
    connection = Connection((None, ANSWER))
    who = ServedBy(node="big", replica="r", device="card")
    one = PeerTarget(who, "big-pc", connection, lifeline, lambda: 0.0, spare=lambda: False)
    assert [each.text async for each in one.run(CHAT, call())] == ["hi"]


async def test_whoever_watches_a_peer_is_told_of_each_call_and_each_piece():
    seen = []

    class Watch:
        def call_began(self):
            seen.append("began")

        def call_ended(self):
            seen.append("ended")

        def heard(self):
            seen.append("heard")

    connection = Connection(("inference.delta", {"text": "h"}), (None, ANSWER))
    one = PeerTarget(ServedBy(node="b", replica="r", device="c"), "b", connection, Lifeline(Watch()), lambda: 0.0)
    running = one.run(CHAT, call())
    await anext(running)
    assert seen == ["began", "heard"]
    await running.aclose()
    assert seen == ["began", "heard", "ended"]


async def test_a_peer_that_is_given_up_while_the_caller_reads_is_noticed_with_the_next_piece():
    lifeline = Lifeline()
    connection = Connection(("inference.delta", {"text": "h"}), (None, ANSWER))
    one = PeerTarget(ServedBy(node="big", replica="r", device="card"), "big-pc", connection, lifeline, lambda: 0.0)
    running = one.run(CHAT, call())
    assert (await anext(running)).text == "h"
    lifeline.cut("is dead", dead=True)
    assert (await anext(running)).text == "hi", "what came all the same is not thrown away"
    await running.aclose()


async def test_what_only_a_worker_can_do_is_not_sent():
    with pytest.raises(TypeError):
        await events(SaveParams(sequence=1, path="p"), None)


def test_vectors_are_passed_on_as_they_came():
    """Not a copy, not a number: the very strings of the peer's JSON."""
    vectors = ["AACAPw==" * 10, "AAAAQA==" * 10]
    embedded = finished_of(EmbedParams(input=["a", "b"]), {**VECTORS, "embeddings": vectors})
    assert all(one is other for one, other in zip(embedded.vectors, vectors, strict=True))
