"""Every call gets exactly one answer, whatever its method does; nothing of an exception gets out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import orjson
import pytest
from fake_node import FakeNode
from hypothesis import given
from hypothesis import strategies as st

from tars.errors import BadGrammar, DoesNotFit, StillLoading, TarsError, UnknownModel
from tars.messages.base import CallContext, Message, NoParams, ResumeMeta
from tars.messages.inference import Delta
from tars.rpc.dispatcher import LOCAL, Arrival, Dispatcher
from tars.rpc.envelope import BadElement, Call, decode
from tars.rpc.method_table import METHODS, MethodSpec, Role
from tars.rpc.methods import handlers_of
from tars.rpc.options import EnvelopeLimits, RpcOptions

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
OPTIONS = RpcOptions()


def make(node: FakeNode, options: RpcOptions = OPTIONS) -> Dispatcher:
    return Dispatcher(handlers_of(node), node, options)


def call_of(method: str, params: Any = None, request_id: Any = 1) -> Call | BadElement:
    body = {"jsonrpc": "2.0", "method": method, "id": request_id, **({} if params is None else {"params": params})}
    element = decode(orjson.dumps(body), EnvelopeLimits())
    assert not isinstance(element, list)
    return element


async def ask(dispatcher: Dispatcher, method: str, params: Any = None, arrival: Arrival | None = None) -> Any:
    answer = await dispatcher.answer(call_of(method, params), arrival or Arrival())
    assert answer is not None
    answered = orjson.loads(answer)
    assert answered.pop("jsonrpc") == "2.0"
    assert answered.pop("id") == 1
    return answered


async def test_every_row_of_the_table_is_answered_with_its_result(node: FakeNode) -> None:
    params = {
        "mesh.explain": {"model": "m"},
        "mesh.join": JOIN,
        "mesh.gossip": {"envelope": {}},
        "calls.explain": {"id": "0a" * 16},
        "mesh.claim": {"key": "0a" * 32, "body": "0b" * 32, "claim": {"owner": "node-2", "token": "t"}},
        "mesh.settle": {"key": "0a" * 32, "body": "0b" * 32, "claim": {"owner": "node-2", "token": "t"}},
        "mesh.await_answer": {"key": "0a" * 32, "body": "0b" * 32, "wait_ms": 1},
        "mesh.token_revoke": {"id": "0a1b2c3d"},
        "mesh.key_new": {"name": "laptop"},
        "mesh.key_revoke": {"name": "laptop"},
        "mesh.remove": {"node": "box"},
        "models.deploy": {"model": "m"},
        "models.pull": {"model": "m"},
        "models.add_file": {"model": "m", "path": "/f"},
        "models.remove": {"model": "m"},
        "inference.chat": CHAT,
        "inference.complete": {"prompt": "once"},
        "inference.embed": {"input": ["a", "b"]},
        "inference.rerank": {"query": "q", "documents": ["a", "b"]},
        "inference.tokenize": {"text": "a"},
    }
    dispatcher = make(node)
    for name, spec in METHODS.items():
        for role in sorted(spec.roles):
            answer = await ask(dispatcher, name, params.get(name), Arrival(role=role, peer="node-2"))
            if spec.result is not None:
                spec.result.model_validate(answer["result"])
    counted = [name for name, spec in METHODS.items() for _ in spec.roles if not spec.is_background]
    assert node.started == counted
    assert [error for _, error, _ in node.ended] == [None] * len(counted)


@pytest.mark.parametrize("role", Role)
async def test_a_method_runs_for_the_roles_of_its_row_and_for_nobody_else(node: FakeNode, role: Role) -> None:
    dispatcher = make(node)
    for name, spec in METHODS.items():
        answer = await ask(dispatcher, name, None, Arrival(role=role))
        kind = answer.get("error", {}).get("data", {}).get("kind")
        if role in spec.roles:
            assert kind not in ("forbidden", "not_a_member")
        else:
            assert kind == ("not_a_member" if role is Role.STRANGER else "forbidden")
            assert "nothing was run" in answer["error"]["message"]
            assert name not in node.started
    assert not {name for name in node.started if role not in METHODS[name].roles}


async def test_a_call_has_no_role_but_a_clients_unless_it_is_given_one(node: FakeNode) -> None:
    assert (await ask(make(node), "mesh.key_list", None, Arrival()))["error"]["data"]["kind"] == "forbidden"
    assert "result" in await ask(make(node), "mesh.key_list", None, LOCAL)


async def test_gossip_is_neither_counted_nor_refused_for_want_of_a_place(node: FakeNode) -> None:
    dispatcher = make(node, RpcOptions(max_concurrent_calls=1))
    async with AsyncExitStack() as places:
        for _ in range(1 + 16):
            await places.enter_async_context(dispatcher.admission.within_bounds(None, inference=False))
        arrival = Arrival(role=Role.PEER, peer="node-2")
        assert (await ask(dispatcher, "node.describe", None, arrival))["error"]["data"]["kind"] == "overloaded"
        assert "result" in await ask(dispatcher, "mesh.gossip", {"envelope": {"a": 1}}, arrival)
    assert node.mesh.heard[0][0] == "node-2"
    assert node.started == ["node.describe"]


async def test_a_join_knows_the_address_that_it_came_from(node: FakeNode) -> None:
    await ask(make(node), "mesh.join", JOIN, Arrival(role=Role.STRANGER, source="192.0.2.7"))
    assert node.mesh.heard[0][0] == "192.0.2.7"


JOIN = {
    "secret": "s" * 22,
    "node": "00000000-0000-4000-8000-000000000000",
    "name": "box",
    "certificate_request": "pem",
    "addresses": [],
    "clock_ms": 0,
}


async def test_a_method_without_a_handler_is_refused_when_the_node_starts(node: FakeNode) -> None:
    handlers = handlers_of(node)
    del handlers["node.ping"]
    with pytest.raises(ValueError, match=r"node\.ping"):
        Dispatcher(handlers, node, OPTIONS)


async def test_positional_params_are_refused_with_what_to_send_instead(node: FakeNode) -> None:
    error = (await ask(make(node), "inference.tokenize", ["text"]))["error"]
    assert error["code"] == -32602
    assert "named params only" in error["message"]
    assert node.params == []


async def test_an_unknown_method_is_named_but_not_counted(node: FakeNode) -> None:
    error = (await ask(make(node), "node.pong" + "g" * 500))["error"]
    assert (error["code"], error["data"]["kind"]) == (-32601, "method_not_found")
    assert len(error["message"]) < 250
    assert node.started == []


@pytest.mark.parametrize(
    "raised",
    [
        UnknownModel("no such model", details={"known": ["a"]}),
        StillLoading("wait", retry_after_ms=500, details={"stage": "read", "percent": 12.5}),
        DoesNotFit("too big", details={"devices": []}),
        BadGrammar("line 3"),
    ],
)
@pytest.mark.parametrize("method", ["inference.chat", "inference.embed", "node.ping"])
async def test_an_error_of_the_tree_arrives_with_its_code_kind_and_details(
    node: FakeNode, raised: TarsError, method: str
) -> None:
    node.error = raised
    params = {"inference.chat": CHAT, "inference.embed": {"input": "a"}}.get(method)
    error = (await ask(make(node), method, params))["error"]
    trace_id = error["data"]["trace_id"]
    assert error == orjson.loads(orjson.dumps(raised.to_json(node="node-1", trace_id=trace_id)))
    assert node.ended == [(method, raised, trace_id)]


@pytest.mark.parametrize("method", ["node.ping", "node.describe", "inference.chat", "inference.embed"])
@pytest.mark.parametrize(
    "fault", [RuntimeError, TypeError, KeyError, TimeoutError, ConnectionResetError, AssertionError]
)
async def test_any_other_exception_is_an_internal_error_whose_text_stays_in_the_log(
    node: FakeNode, method: str, fault: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    node.error = fault("/home/secret/path hunter2")
    params = {"inference.chat": CHAT, "inference.embed": {"input": "a"}}.get(method)
    with caplog.at_level(logging.ERROR):
        error = (await ask(make(node), method, params))["error"]
    assert (error["code"], error["data"]["kind"]) == (-32603, "internal")
    assert "hunter2" not in str(error)
    assert fault.__name__ not in str(error)
    # The traceback is found by the trace id, and only there.
    assert error["data"]["trace_id"] in caplog.text
    assert "hunter2" in caplog.text
    assert node.ended[0][1].kind == "internal"


@pytest.mark.parametrize("wrong", [None, {"node": "x"}, NoParams()])
async def test_a_result_of_another_type_than_the_rows_is_an_internal_error(
    node: FakeNode, wrong: object, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher = Dispatcher({**handlers_of(node), "node.ping": lambda params: wrong}, node, OPTIONS)
    assert (await ask(dispatcher, "node.ping"))["error"]["code"] == -32603
    assert "PingResult" in caplog.text


async def test_a_result_that_json_cannot_say_is_an_internal_error_and_counted_as_one(node: FakeNode) -> None:
    node.pieces = ["\ud800"]
    element = call_of("inference.chat", CHAT)
    answer = await make(node).answer(element)
    assert answer is not None
    assert orjson.loads(answer)["error"]["code"] == -32603
    assert node.ended[0][1].kind == "internal"


class Streamed(Message):
    text: str


STREAM = MethodSpec("inference.s", "", result=Streamed, delta=Delta, delta_notification="inference.delta")


@pytest.mark.parametrize("ending", [[], ["result", "delta"], ["result", "result"]])
async def test_a_stream_that_does_not_end_with_exactly_one_result_is_an_internal_error(
    node: FakeNode, ending: list[str]
) -> None:
    async def stream(params: NoParams, context: CallContext) -> AsyncIterator[Message]:
        yield Delta(text="a")
        for one in ending:
            yield Delta(text="b") if one == "delta" else Streamed(text="ab")

    dispatcher = Dispatcher({STREAM.name: stream}, node, OPTIONS, {STREAM.name: STREAM})
    assert (await ask(dispatcher, STREAM.name))["error"]["code"] == -32603


async def test_deltas_go_to_the_one_who_streams_and_are_dropped_for_the_one_who_does_not(node: FakeNode) -> None:
    seen: list[str] = []

    async def emit(spec: MethodSpec, delta: Message) -> None:
        assert isinstance(delta, Delta)
        seen.append(delta.text)

    dispatcher = make(node)
    streamed = await dispatcher.answer(call_of("inference.chat", CHAT), Arrival(), emit)
    assert seen == ["Hel", "lo"]
    assert streamed == await dispatcher.answer(call_of("inference.chat", CHAT))


@pytest.mark.parametrize(
    ("in_meta", "in_header", "expected"),
    [(20_000, None, 20), (None, 30_000, 30), (20_000, 10_000, 10), (None, None, 300)],
)
async def test_the_smallest_budget_that_was_given_is_the_calls_deadline(
    node: FakeNode, in_meta: int | None, in_header: int | None, expected: int
) -> None:
    params = {**CHAT, **({"_meta": {"timeout_ms": in_meta}} if in_meta else {})}
    before = asyncio.get_running_loop().time()
    await ask(make(node), "inference.chat", params, Arrival(timeout_ms=in_header))
    left = node.contexts[0].deadline.at - before
    assert expected - 1 < left < expected + 1


@pytest.mark.parametrize("method", ["inference.chat", "inference.embed", "node.describe"])
async def test_work_past_its_deadline_is_stopped_and_says_so(node: FakeNode, method: str) -> None:
    node.gate = asyncio.Event()
    params = {"inference.chat": CHAT, "inference.embed": {"input": "a"}}.get(method, {})
    error = (await ask(make(node), method, {**params, "_meta": {"timeout_ms": 20}}))["error"]
    assert (error["code"], error["data"]["retryable"]) == (-32011, True)
    assert node.closed.is_set()


async def test_what_surrounds_a_call_reaches_its_method(node: FakeNode) -> None:
    meta = {
        "idempotency_key": "abc",
        "hops": 1,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    await ask(make(node), "inference.chat", {**CHAT, "_meta": meta}, Arrival(caller="laptop", traceparent="ignored"))
    context = node.contexts[0]
    assert (context.idempotency_key, context.hops, context.caller) == ("abc", 1, "laptop")
    assert (context.method, context.face) == ("inference.chat", "rpc")
    assert context.trace_id == "0af7651916cd43dd8448eb211c80319c"


async def test_a_peer_says_whose_call_it_is_and_where_its_answers_are(node: FakeNode) -> None:
    meta = {"hops": 1, "caller": "laptop", "priority": "batch", "resume": {"answers": [[5, 6]], "seed": 7}}
    meta["file_sha256"] = "ab"
    await ask(make(node), "inference.chat", {**CHAT, "_meta": meta}, Arrival("mesh", role=Role.PEER, peer="node-2"))
    context = node.contexts[-1]
    assert (context.caller, context.peer, context.priority) == ("laptop", "node-2", "batch")
    assert context.resume == ResumeMeta(answers=[[5, 6]], seed=7)
    assert context.file_sha256 == "ab"
    await ask(make(node), "inference.chat", CHAT, Arrival("mesh", role=Role.PEER, peer="node-2"))
    assert node.contexts[-1].caller == "mesh"


@pytest.mark.parametrize("role", [Role.CLIENT, Role.ADMINISTRATOR])
@pytest.mark.parametrize(
    "said", [{"resume": {"answers": [[5]], "seed": 7}}, {"caller": "somebody else"}, {"file_sha256": "ab"}]
)
async def test_only_a_peer_may_say_so(node: FakeNode, role: Role, said: dict[str, object]) -> None:
    refused = await ask(make(node), "inference.chat", {**CHAT, "_meta": said}, Arrival(role=role))
    assert refused["error"]["data"]["kind"] == "forbidden"
    assert "_meta.resume" in refused["error"]["message"]
    assert not node.started


async def test_what_generates_nothing_cannot_go_on(node: FakeNode) -> None:
    params = {"input": "a", "_meta": {"hops": 1, "resume": {"answers": [[5]], "seed": 7}}}
    refused = await ask(make(node), "inference.embed", params, Arrival(role=Role.PEER, peer="node-2"))
    assert refused["error"]["data"]["kind"] == "invalid_params"
    assert not refused["error"]["data"]["retryable"]


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "junk",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
    ],
)
async def test_a_malformed_traceparent_starts_a_new_trace(node: FakeNode, traceparent: str) -> None:
    dispatcher = make(node)
    for _ in range(2):
        await dispatcher.answer(call_of("inference.chat", CHAT), Arrival(traceparent=traceparent))
    first, second = (context.trace_id for context in node.contexts)
    assert first != second
    for trace_id in (first, second):
        assert len(trace_id) == 32
        assert int(trace_id, 16)


async def test_a_full_node_refuses_inference_at_once_and_still_answers_its_operator(node: FakeNode) -> None:
    node.gate = asyncio.Event()
    dispatcher = make(node, replace(OPTIONS, max_concurrent_calls=2))
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(ask(dispatcher, "inference.embed", {"input": "a"})) for _ in range(2)]
        for _ in range(20):  # turns of the loop, no time: both are at the gate after three
            await asyncio.sleep(0)
        assert len(node.started) == 2
        error = (await ask(dispatcher, "inference.embed", {"input": "a"}))["error"]
        assert (error["data"]["kind"], error["data"]["retryable"]) == ("overloaded", True)
        assert error["data"]["retry_after_ms"] > 0
        assert "result" in await ask(dispatcher, "node.ping")
        assert "result" in await ask(dispatcher, "node.drain")
        node.gate.set()
    assert all("result" in one.result() for one in waiting)
    assert "result" in await ask(dispatcher, "inference.embed", {"input": "a"})


async def test_a_cancelled_call_closes_its_stream_and_is_counted_as_cancelled(node: FakeNode) -> None:
    node.gate = asyncio.Event()
    task = asyncio.create_task(make(node).answer(call_of("inference.chat", CHAT)))
    async with asyncio.timeout(5):
        await node.waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert node.closed.is_set()
    assert [(method, error.kind) for method, error, _ in node.ended] == [("inference.chat", "cancelled")]


async def test_a_batch_is_answered_in_order_under_its_own_concurrency(node: FakeNode) -> None:
    node.gate = asyncio.Event()
    dispatcher = make(node, replace(OPTIONS, batch_concurrency=2))
    calls = [call_of("inference.embed", {"input": "a"}, request_id) for request_id in range(5)]
    task = asyncio.create_task(dispatcher.answer_batch([*calls, call_of("node.ping", None, "last")]))
    async with asyncio.timeout(5):
        await node.waiting.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(node.started) == 2
        node.gate.set()
        answers = orjson.loads(await task or b"")
    assert [answer["id"] for answer in answers] == [0, 1, 2, 3, 4, "last"]


async def test_a_cancelled_batch_leaves_nothing_running(node: FakeNode) -> None:
    node.gate = asyncio.Event()
    dispatcher = make(node)
    calls = [call_of("inference.embed", {"input": "a"}) for _ in range(5)]
    task = asyncio.create_task(dispatcher.answer_batch(calls))
    async with asyncio.timeout(5):
        await node.waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(node.ended) == len(node.started)
    assert {error.kind for _, error, _ in node.ended} == {"cancelled"}


async def test_a_notification_is_run_and_not_answered_even_when_it_fails(node: FakeNode) -> None:
    node.error = RuntimeError("boom")
    element = decode(b'{"jsonrpc":"2.0","method":"node.ping"}', EnvelopeLimits())
    assert isinstance(element, Call)
    assert await make(node).answer(element) is None
    assert node.ended[0][1].kind == "internal"


# No lone surrogates: the test could not send them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=6,
)


def calls_for(spec: MethodSpec) -> st.SearchStrategy[Any]:
    """Calls with the method's own names and any JSON for their values, now and then with something else."""
    named = st.fixed_dictionaries({}, optional=dict.fromkeys(spec.params.model_fields, JSON) | {"_meta": JSON})
    complete = st.fixed_dictionaries(dict.fromkeys(spec.params.model_fields, JSON))
    return st.fixed_dictionaries(
        {"jsonrpc": st.just("2.0"), "method": st.just(spec.name), "params": named | complete | JSON},
        optional={"id": st.integers(-5, 5) | TEXT | st.none()},
    )


class Watch(FakeNode):
    """Fails the test when a method meets params that its row does not allow."""

    def _met(self, params: object = None, context: CallContext | None = None) -> None:
        if isinstance(params, Message):
            type(params).model_validate(params.model_dump())
        else:
            assert params is None or isinstance(params, str)


WATCH = Watch()
WATCHED = make(WATCH)


@given(batch=st.lists(st.one_of([calls_for(spec) for spec in METHODS.values()]), min_size=1, max_size=6))
def test_any_json_as_params_gets_exactly_one_well_formed_answer(batch: list[dict[str, Any]]) -> None:
    elements = decode(orjson.dumps(batch), EnvelopeLimits())
    assert isinstance(elements, list)
    answer = asyncio.run(WATCHED.answer_batch(elements))
    answers = [] if answer is None else orjson.loads(answer)
    # What is no request at all is answered under the id null, even where it has none (the specification's example).
    broken = [not isinstance(one["params"], dict | list) for one in batch]
    expected = [one.get("id") for one, is_broken in zip(batch, broken, strict=True) if "id" in one or is_broken]
    assert [one["id"] for one in answers] == expected
    for one in answers:
        assert one["jsonrpc"] == "2.0"
        assert ("result" in one) != ("error" in one)
        if "error" in one:
            # Whatever was sent, the fault is the caller's (1001: the pretended node knows no model of that name):
            # a -32603 would mean that something of ours broke on it.
            # -32018 and -32022: a method for another role.
            assert one["error"]["code"] in (-32600, -32602, -32018, -32022, 1001), one
            assert set(one["error"]["data"]) >= {"kind", "retryable", "retry_after_ms", "node", "trace_id"}
            assert "Traceback" not in one["error"]["message"]
            assert "pydantic" not in str(one["error"])
    assert len(WATCH.started) == len(WATCH.ended)
