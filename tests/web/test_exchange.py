"""What holds for every face: one answer, one count, one deadline, and the work's end with the caller's."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from aiohttp import web

from tars.errors import InternalError, InvalidParams, Overloaded
from tars.messages.inference import ChatParams, Delta, EmbedParams, Progress, Tokenized, TokenizeParams
from tars.rpc.access import Access, access_middleware
from tars.rpc.admission import Admission
from tars.rpc.listener import listen
from tars.rpc.options import EnvelopeLimits, RpcOptions
from tars.web.exchange import Face, dump, event, json_response, result_of, translated, validated
from tars.web.rest import error_body
from tars.web.routes import render_refusal

BOUND = 5.0


@pytest.fixture
async def ask(service, node):
    """`await ask(handler, ...)`: one request through a face to a handler of the test's own; the response, its body read."""
    listeners = []

    async def start(handler, *, method="node.test", options=None, looks=False, **request):
        options = options or RpcOptions()
        face = Face("test", service, options, Admission(options), error_body)
        access = Access(options.access)
        app = web.Application(middlewares=[access_middleware(access, render_refusal)])
        app.router.add_post("/test", face.look(handler) if looks else face.call(method, handler))
        listeners.append(await listen(app, "127.0.0.1", 0, access))
        async with node.http.post(f"{listeners[-1].url}/test", **{"json": {}} | request) as response:
            await response.read()
            return response

    yield start
    for listener in listeners:
        await listener.close()


async def test_a_call_is_counted_once_whatever_becomes_of_it(ask, service):
    async def good(exchange):
        return json_response(await exchange.whole(answer))

    async def answer(call):
        return {"method": call.method}

    async def bad(exchange):
        raise Overloaded("no")

    async def broken(exchange):
        raise KeyError("/secret")

    assert (await ask(good)).status == 200
    assert (await ask(bad)).status == 429
    response = await ask(broken)
    assert response.status == 500
    assert "secret" not in await response.text()
    assert service.started == ["node.test"] * 3
    assert [error.kind if error else None for _, error, _ in service.ended] == [None, "overloaded", "internal"]


async def test_looking_is_not_counted(ask, service):
    async def look(exchange):
        raise Overloaded("no")

    assert (await ask(look, looks=True)).status == 429
    assert service.started == service.ended == []


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 300.0),
        ({"X-Request-Timeout-Ms": "2000"}, 2.0),
        ({"X-Stainless-Read-Timeout": "1.5"}, 1.5),
        ({"X-Stainless-Read-Timeout": "9", "X-Request-Timeout-Ms": "2000"}, 2.0),
        ({"X-Stainless-Read-Timeout": "NaN"}, 300.0),
        ({"X-Stainless-Read-Timeout": "-1"}, 300.0),
        ({"X-Stainless-Read-Timeout": "soon"}, 300.0),
        ({"X-Stainless-Read-Timeout": "1e12"}, 86_400.0),
        # The JavaScript client's are whole seconds, rounded down.
        ({"X-Stainless-Timeout": "4"}, 5.0),
        ({"X-Stainless-Timeout": "0"}, 1.0),
        ({"X-Stainless-Timeout": "-1"}, 300.0),
        ({"X-Stainless-Timeout": "600", "X-Stainless-Read-Timeout": "2"}, 2.0),
    ],
)
async def test_the_deadline_is_the_shortest_that_was_said(ask, headers, seconds):
    async def handler(exchange):
        async def work(call):
            return call.deadline.remaining(asyncio.get_running_loop().time())

        return json_response({"left": await exchange.whole(work)})

    left = (await (await ask(handler, headers=headers)).json())["left"]
    assert seconds - 1 < left <= seconds


async def test_of_a_stream_an_openai_client_bounds_the_wait_for_its_beginning(ask):
    async def handler(exchange):
        async def frames(call):
            now = asyncio.get_running_loop().time()
            first_by = None if call.first_by is None else call.first_by.remaining(now)
            yield event({"left": call.deadline.remaining(now), "first_by": first_by})

        return await exchange.stream(frames, lambda error: b"")

    for headers, first_by in [
        ({}, None),
        ({"X-Stainless-Read-Timeout": "2.5"}, 2.5),
        ({"X-Stainless-Timeout": "4"}, 5),
    ]:
        said = orjson.loads((await (await ask(handler, headers=headers)).text()).removeprefix("data: "))
        assert said["left"] > 290
        assert said["first_by"] == (None if first_by is None else pytest.approx(first_by, abs=1.0))


async def test_the_body_and_then_the_header_say_how_urgent_a_call_is(ask):
    async def handler(exchange):
        exchange.priority = exchange.request.query.get("body")

        async def work(call):
            return call.priority

        return json_response(await exchange.whole(work))

    said = [
        await (await ask(handler, headers=headers, params=body)).json()
        for headers, body in [
            ({}, {}),
            ({"X-Priority": "batch"}, {}),
            ({"X-Priority": "batch"}, {"body": "interactive"}),
            ({}, {"body": "batch"}),
        ]
    ]
    assert said == [None, "batch", "interactive", "batch"]


@pytest.mark.parametrize(
    "headers", [{"X-Request-Timeout-Ms": "soon"}, {"Idempotency-Key": "k" * 201}, {"X-Priority": "urgent"}]
)
async def test_a_header_of_ours_that_makes_no_sense_is_refused(ask, headers):
    async def handler(exchange):
        return json_response(await exchange.whole(lambda call: asyncio.sleep(0, {})))

    assert (await ask(handler, headers=headers)).status == 400


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b'{"a": 1}', 200, None),
        (b'{"a": ', 400, "parse_error"),
        (b'{"a": NaN}', 400, "parse_error"),
        (b'{"a": "\\ud800"}', 400, "parse_error"),
        (b"[1]", 400, "invalid_params"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", 413, "limit_exceeded"),
        (b'{"a": "' + b"x" * 600 + b'"}', 413, "limit_exceeded"),
        (b'{"a": "' + b"x" * 2000 + b'"}', 413, "limit_exceeded"),
    ],
)
async def test_a_body_is_an_object_within_the_bounds(ask, body, status, kind):
    async def handler(exchange):
        return json_response(await exchange.json())

    limits = EnvelopeLimits(max_body_bytes=1000, max_string_bytes=500)
    headers = {"Content-Type": "application/json"}
    response = await ask(handler, options=RpcOptions(envelope=limits), json=None, data=body, headers=headers)
    assert response.status == status
    if kind is not None:
        assert (await response.json())["error"]["data"]["kind"] == kind


async def test_a_connection_whose_body_was_not_read_is_closed(ask):
    async def handler(exchange):
        raise Overloaded("before the body was read")

    async def slowly():
        yield b"{"
        await asyncio.sleep(0)
        yield b"}" * 100_000

    response = await ask(handler, json=None, data=slowly(), headers={"Content-Type": "application/json"})
    assert response.headers["Connection"] == "close"


async def test_a_stream_that_yields_nothing_is_an_empty_answer_and_no_hang(ask, service):
    async def handler(exchange):
        async def frames(call):
            for frame in ():
                yield frame

        return await exchange.stream(frames, lambda error: b"")

    async with asyncio.timeout(BOUND):
        response = await ask(handler)
    assert response.status == 500
    assert service.ended[0][1].kind == "internal"


async def test_frames_are_closed_when_the_caller_leaves(ask, service):
    closed = asyncio.Event()
    waiting = asyncio.Event()

    async def handler(exchange):
        async def frames(call):
            try:
                while True:
                    yield b"data: x\n\n"
                    waiting.set()
                    await asyncio.sleep(0)
            finally:
                closed.set()

        return await exchange.stream(frames, lambda error: b"")

    asking = asyncio.create_task(ask(handler))
    async with asyncio.timeout(BOUND):
        await waiting.wait()
        asking.cancel()
        await closed.wait()
        await service.all_ended.wait()
    assert service.ended[0][1].kind == "cancelled"


async def test_a_result_is_what_a_stream_ends_with_and_a_stream_without_one_is_a_fault_of_ours():
    closed = []

    async def stream(*items):
        try:
            for item in items:
                yield item
        finally:
            closed.append(items)

    pieces = (Delta(text="a"), Progress(stage="load", percent=1, node="box"))
    result = Tokenized(tokens=[1])
    assert await result_of(stream(*pieces, result)) is result
    with pytest.raises(InternalError):
        await result_of(stream(*pieces))
    assert closed == [(*pieces, result), pieces]


def test_what_messages_refuse_is_the_callers_fault_with_its_place():
    with pytest.raises(InvalidParams) as refused:
        validated(EmbedParams, {"input": ["a", 5]})
    assert refused.value.details["errors"][0]["at"] == "input[1]"
    with pytest.raises(InvalidParams) as refused:
        translated(lambda: ChatParams(messages=[], temperature=9), {"temperature": 9, "messages": []})
    assert {error["at"] for error in refused.value.details["errors"]} == {"messages", "temperature"}


def test_an_event_is_one_line_of_json_with_its_name():
    assert event({"a": "b\nc"}, "result") == b'event: result\ndata: {"a":"b\\nc"}\n\n'
    assert event({}) == b"data: {}\n\n"
    assert dump(TokenizeParams(text="a")) == b'{"model":null,"text":"a","add_special":true}'
