"""POST /rpc on a real server: statuses, streams, limits, and what happens to the work when the caller leaves."""

from __future__ import annotations

import asyncio
import gzip
import io
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from fake_node import FakeNode

from tars.errors import DeadlineExceeded, StillLoading, UnknownModel, WorkerCrashed
from tars.rpc.access import Access
from tars.rpc.admission import Admission
from tars.rpc.http_server import add_rpc_routes, closing_middleware, read_body
from tars.rpc.listener import Listener, listen
from tars.rpc.options import AccessOptions, EnvelopeLimits, RpcOptions

Serve = Callable[..., Awaitable[Listener]]
PING = {"jsonrpc": "2.0", "method": "node.ping", "id": 1}
CHAT = {
    "jsonrpc": "2.0",
    "method": "inference.chat",
    "id": "c-1",
    "params": {"messages": [{"role": "user", "content": "hello"}]},
}
STREAM = {"Accept": "text/event-stream"}


async def post(session: aiohttp.ClientSession, url: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    async with session.post(url + "/rpc", data=data, headers=headers) as response:
        read = await response.read()
        return response.status, orjson.loads(read) if read else None, response.headers


async def events_of(response: aiohttp.ClientResponse) -> list[Any]:
    text = (await response.read()).decode()
    assert text.endswith("\n\n")
    frames = text.removesuffix("\n\n").split("\n\n")
    return [orjson.loads(frame.removeprefix("data: ")) for frame in frames if not frame.startswith(":")]


async def test_a_call_is_answered_with_200_and_a_notification_with_204(
    session: aiohttp.ClientSession, url: str, node: FakeNode
) -> None:
    status, answer, headers = await post(session, url, PING)
    assert (status, answer["result"]["node"]) == (200, "node-1")
    assert headers["Content-Type"] == "application/json"
    assert (await post(session, url, {"jsonrpc": "2.0", "method": "node.ping"}))[:2] == (204, None)
    assert node.started == ["node.ping"] * 2


async def test_a_dispatched_error_is_answered_with_200_and_a_refused_body_with_its_own_status(
    session: aiohttp.ClientSession, url: str
) -> None:
    assert (await post(session, url, {**PING, "method": "nope"}))[0] == 200
    status, answer, _ = await post(session, url, b"{nope")
    assert (status, answer["id"], answer["error"]["code"]) == (400, None, -32700)
    status, answer, _ = await post(session, url, b"")
    assert (status, answer["error"]["data"]["kind"]) == (400, "parse_error")


async def test_a_batch_of_a_hundred_thousand_is_refused_and_the_node_goes_on(
    session: aiohttp.ClientSession, url: str, node: FakeNode
) -> None:
    status, answer, _ = await post(session, url, b"[" + b",".join([b"1"] * 100_000) + b"]")
    assert (status, answer["error"]["data"]["kind"]) == (413, "limit_exceeded")
    assert (await post(session, url, PING))[0] == 200
    assert node.started == ["node.ping"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
async def test_another_http_method_is_told_to_post(session: aiohttp.ClientSession, url: str, method: str) -> None:
    async with session.request(method, url + "/rpc") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        if method != "HEAD":
            assert "node.ping" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_a_body_that_does_not_say_that_it_is_json_is_refused(
    session: aiohttp.ClientSession, url: str, node: FakeNode, content_type: str
) -> None:
    status, answer, _ = await post(session, url, PING, **{"Content-Type": content_type})
    assert (status, answer["error"]["data"]["kind"]) == (415, "unsupported_media_type")
    assert node.started == []


async def test_a_charset_of_utf_8_is_as_good_as_none(session: aiohttp.ClientSession, url: str) -> None:
    assert (await post(session, url, PING, **{"Content-Type": 'Application/JSON; charset="UTF-8"'}))[0] == 200
    assert (await post(session, url, PING, **{"Content-Type": "application/json; charset=latin-1"}))[0] == 415


SMALL = RpcOptions(envelope=EnvelopeLimits(max_body_bytes=100_000))


async def test_a_body_over_the_bound_is_refused_before_it_is_read(
    serve: Serve, session: aiohttp.ClientSession, node: FakeNode
) -> None:
    url = (await serve(SMALL)).url
    async with session.post(url + "/rpc", data=b" " * 300_000) as response:
        answer = await response.json()
        assert response.status == 413
    assert answer["error"]["data"]["limit"] == 100_000
    assert (await post(session, url, PING))[0] == 200
    assert node.started == ["node.ping"]


async def test_an_endless_chunked_body_is_refused_at_the_bound(serve: Serve) -> None:
    listener = await serve(SMALL)
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    writer.write(
        b"POST /rpc HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        % listener.port
    )
    sent = 0
    async with asyncio.timeout(10):
        head = asyncio.create_task(reader.readuntil(b"\r\n"))
        while not head.done():
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            sent += 4096
            await writer.drain()
            await asyncio.sleep(0)
    assert b"413" in await head
    # What lies in socket buffers comes on top of the bound; the body never ends by itself.
    assert sent < 20_000_000
    writer.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "nonsense"])
async def test_a_packed_body_is_refused_and_never_unpacked(
    session: aiohttp.ClientSession, node: FakeNode, url: str, encoding: str
) -> None:
    # 2 GB of blanks: unpacking them would take seconds, refusing them takes none.
    bomb = io.BytesIO(gzip.compress(b" " * 20_000_000) * 100)
    began = time.process_time()
    async with session.post(url + "/rpc", data=bomb, headers={"Content-Encoding": encoding}) as response:
        assert response.status == 415
        assert (await response.json())["error"]["data"]["kind"] == "unsupported_media_type"
    assert (await post(session, url, PING))[0] == 200
    assert time.process_time() - began < 0.5
    assert "inference.chat" not in node.started


async def test_a_stream_is_deltas_with_the_calls_id_and_then_the_response(
    session: aiohttp.ClientSession, url: str
) -> None:
    async with session.post(url + "/rpc", json=CHAT, headers=STREAM) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert (response.headers["Cache-Control"], response.headers["X-Accel-Buffering"]) == ("no-store", "no")
        *deltas, answer = await events_of(response)
    assert [(one["method"], one["params"]["id"], one["params"]["text"]) for one in deltas] == [
        ("inference.delta", "c-1", "Hel"),
        ("inference.delta", "c-1", "lo"),
    ]
    assert (answer["id"], answer["result"]["message"]["content"]) == ("c-1", "Hello")


async def test_the_first_delta_arrives_before_the_second_is_made(
    session: aiohttp.ClientSession, url: str, node: FakeNode
) -> None:
    node.gate = asyncio.Event()
    async with asyncio.timeout(5), session.post(url + "/rpc", json=CHAT, headers=STREAM) as response:
        first = await response.content.readuntil(b"\n\n")
        assert b"Hel" in first
        assert not node.gate.is_set()
        node.gate.set()
        assert b"Hello" in await response.read()


@pytest.mark.parametrize("late", [False, True])
async def test_an_error_in_a_stream_is_its_response(
    session: aiohttp.ClientSession, url: str, node: FakeNode, late: bool
) -> None:
    if late:
        node.late_error = WorkerCrashed("gone", retry_after_ms=100)
    else:
        node.error = StillLoading("wait", retry_after_ms=100)
    async with session.post(url + "/rpc", json=CHAT, headers=STREAM) as response:
        assert response.status == 200
        *deltas, answer = await events_of(response)
    assert len(deltas) == (2 if late else 0)
    assert (answer["id"], answer["error"]["code"]) == ("c-1", -32014 if late else 1003)


@pytest.mark.parametrize(
    ("method", "accept", "streams"),
    [
        ("inference.chat", "application/json, text/event-stream", True),
        ("inference.chat", "application/json", False),
        ("inference.chat", "*/*", False),
        ("node.ping", "application/json, text/event-stream", False),
        ("node.ping", "text/event-stream", True),
    ],
)
async def test_an_answer_streams_where_the_caller_accepts_it_and_the_method_can(
    session: aiohttp.ClientSession, url: str, method: str, accept: str, streams: bool
) -> None:
    body = {**CHAT, "method": method} if method == "inference.chat" else PING
    async with session.post(url + "/rpc", json=body, headers={"Accept": accept}) as response:
        assert (response.content_type == "text/event-stream") is streams
        answer = (await events_of(response))[-1] if streams else await response.json()
    assert "result" in answer


async def test_a_batch_is_not_streamed(session: aiohttp.ClientSession, url: str, node: FakeNode) -> None:
    status, answer, _ = await post(session, url, [CHAT, PING], Accept="text/event-stream")
    assert (status, answer["error"]["data"]["kind"]) == (406, "invalid_request")
    assert node.started == []
    status, answers, _ = await post(session, url, [CHAT, PING], Accept="text/event-stream, application/json")
    assert (status, [one["id"] for one in answers]) == (200, ["c-1", 1])


async def test_a_streamed_notification_is_run_and_not_answered(
    session: aiohttp.ClientSession, url: str, node: FakeNode
) -> None:
    body = {key: value for key, value in CHAT.items() if key != "id"}
    assert (await post(session, url, body, **STREAM))[:2] == (204, None)
    assert node.started == ["inference.chat"]


async def raw_call(listener: Listener, body: Any, *headers: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    data = orjson.dumps(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    head = [b"POST /rpc HTTP/1.1", b"Host: 127.0.0.1:%d" % listener.port, b"Content-Type: application/json", *headers]
    writer.write(b"\r\n".join([*head, b"Content-Length: %d" % len(data), b"", data]))
    return reader, writer


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_closing_the_connection_cancels_the_work(serve: Serve, node: FakeNode, how: str, streamed: bool) -> None:
    """Through the runner that production uses: aiohttp's own test server would hide the setting's absence."""
    node.gate = asyncio.Event()
    reader, writer = await raw_call(await serve(), CHAT, *([b"Accept: text/event-stream"] if streamed else []))
    async with asyncio.timeout(5):
        if streamed:
            await reader.readuntil(b"Hel")
        await node.waiting.wait()
        if how == "reset":
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # SO_LINGER on, 0 s: close sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        await node.closed.wait()
        await node.ended_one.wait()
    assert [(method, error.kind) for method, error, _ in node.ended] == [("inference.chat", "cancelled")]


async def test_closing_the_connection_cancels_every_call_of_a_batch(serve: Serve, node: FakeNode) -> None:
    node.gate = asyncio.Event()
    embed = {"jsonrpc": "2.0", "method": "inference.embed", "params": {"input": "a"}}
    _, writer = await raw_call(await serve(), [{**embed, "id": number} for number in range(3)])
    async with asyncio.timeout(5):
        await node.waiting.wait()
        writer.close()
        await node.closed.wait()
        while len(node.ended) < 3:
            node.ended_one.clear()
            await node.ended_one.wait()
    assert {error.kind for _, error, _ in node.ended} == {"cancelled"}


async def test_a_silent_stream_carries_heartbeats(serve: Serve, session: aiohttp.ClientSession, node: FakeNode) -> None:
    node.gate = asyncio.Event()
    url = (await serve(RpcOptions(heartbeat_seconds=0.02))).url
    async with asyncio.timeout(5), session.post(url + "/rpc", json=CHAT, headers=STREAM) as response:
        await response.content.readuntil(b"Hel")
        await response.content.readuntil(b": still here\n\n")
        await response.content.readuntil(b": still here\n\n")
        node.gate.set()
        frames = (await response.read()).split(b"\n\n")
    # The comments have not broken the stream.
    answer = orjson.loads(frames[-2].removeprefix(b"data: "))
    assert answer["result"]["message"]["content"] == "Hello"


async def test_the_header_gives_a_call_its_budget(session: aiohttp.ClientSession, url: str, node: FakeNode) -> None:
    node.gate = asyncio.Event()
    _, answer, _ = await post(session, url, CHAT, **{"X-Request-Timeout-Ms": "20"})
    assert answer["error"]["data"]["kind"] == "deadline_exceeded"
    assert node.closed.is_set()


@pytest.mark.parametrize("budget", ["0", "-5", "abc", "1.5", "99999999999999999999", "²", "86400001"])
async def test_a_budget_that_is_none_is_refused(
    session: aiohttp.ClientSession, url: str, node: FakeNode, budget: str
) -> None:
    status, answer, _ = await post(session, url, PING, **{"X-Request-Timeout-Ms": budget})
    assert (status, answer["error"]["code"]) == (400, -32600)
    assert node.started == []


async def test_the_header_says_how_urgent_a_call_is_and_its_meta_goes_before(
    session: aiohttp.ClientSession, url: str, node: FakeNode
) -> None:
    with_meta = {**CHAT, "params": {**CHAT["params"], "_meta": {"priority": "interactive"}}}
    for body, headers in [(CHAT, {}), (CHAT, {"X-Priority": "Batch"}), (with_meta, {"X-Priority": "batch"})]:
        await post(session, url, body, **headers)
    assert [context.priority for context in node.contexts] == [None, "batch", "interactive"]
    status, answer, _ = await post(session, url, CHAT, **{"X-Priority": "urgent"})
    assert status == 400
    assert "interactive or batch" in answer["error"]["message"]


async def test_every_answer_names_its_call(session: aiohttp.ClientSession, url: str, node: FakeNode) -> None:
    for accept in ("application/json", "text/event-stream"):
        async with session.post(f"{url}/rpc", data=orjson.dumps(CHAT), headers={"Accept": accept}) as response:
            await response.read()
            assert response.headers["X-Request-Id"] == node.contexts[-1].trace_id
    node.error = UnknownModel("no such model")
    async with session.post(f"{url}/rpc", data=orjson.dumps(CHAT)) as response:
        refused = orjson.loads(await response.read())
        assert response.headers["X-Request-Id"] == refused["error"]["data"]["trace_id"]
    async with session.post(f"{url}/rpc", data=orjson.dumps([CHAT, CHAT])) as response:
        traces = {each["error"]["data"]["trace_id"] for each in orjson.loads(await response.read())}
        assert len(traces) == 2
        assert "X-Request-Id" not in response.headers


async def test_the_trace_of_the_header_is_the_calls(session: aiohttp.ClientSession, url: str, node: FakeNode) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    await post(session, url, CHAT, traceparent=f"00-{trace}-b7ad6b7169203331-01")
    assert node.contexts[0].trace_id == trace


async def test_a_broken_http_request_gets_no_traceback_and_the_node_goes_on(
    serve: Serve, session: aiohttp.ClientSession
) -> None:
    listener = await serve()
    for junk in (b"\x00\xff\r\n\r\n", b"POST /rpc HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(junk)
        async with asyncio.timeout(5):
            answer = await reader.read()
        assert b"Traceback" not in answer
        assert b"/site-packages/" not in answer
        writer.close()
    assert (await post(session, listener.url, PING))[0] == 200


async def test_a_body_that_does_not_come_is_not_awaited_for_ever() -> None:
    async def answer(request: web.Request) -> web.Response:
        try:
            await read_body(request, 1000, seconds=0.05)
        except DeadlineExceeded as error:
            return web.Response(text=error.kind)
        return web.Response(text="all of it")

    app = web.Application()
    app.router.add_post("/", answer)
    listener = await listen(app, "127.0.0.1", 0, Access(AccessOptions()), shutdown_seconds=0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
    async with asyncio.timeout(10):
        answered = await reader.readuntil(b"deadline_exceeded")
    assert answered.startswith(b"HTTP/1.1 200")
    writer.close()
    await listener.close()


@pytest.fixture
async def stopping(node: FakeNode, session: aiohttp.ClientSession) -> AsyncIterator[tuple[str, Admission]]:
    """A node's URL, and its places, which the test closes."""
    app = web.Application()
    dispatcher = add_rpc_routes(app, node, RpcOptions())
    app.middlewares.append(closing_middleware(dispatcher.admission))
    listener = await listen(app, "127.0.0.1", 0, Access(AccessOptions()), shutdown_seconds=0.1)
    yield listener.url, dispatcher.admission
    await session.close()
    await listener.close()


@pytest.mark.parametrize("headers", [{}, STREAM])
async def test_a_node_that_stops_refuses_inference_with_503_and_ends_the_connection(
    session: aiohttp.ClientSession, stopping: tuple[str, Admission], node: FakeNode, headers: dict[str, str]
) -> None:
    url, admission = stopping
    assert "Connection" not in (await post(session, url, PING))[2]
    admission.close()
    status, answer, told = await post(session, url, CHAT, **headers)
    assert (status, answer["id"], answer["error"]["data"]["kind"]) == (503, None, "draining")
    assert answer["error"]["data"]["retryable"]
    assert (told["Retry-After"], told["Connection"]) == ("5", "close")
    assert "inference.chat" not in node.started
    # Whoever looks at it, or asks for several things, is still answered.
    status, answer, told = await post(session, url, [PING, CHAT])
    assert (status, told["Connection"]) == (200, "close")
    assert [answer[0]["result"]["node"], answer[1]["error"]["data"]["kind"]] == ["node-1", "draining"]


async def test_a_stream_that_is_not_done_in_the_grace_time_ends_with_a_retryable_error(
    session: aiohttp.ClientSession, stopping: tuple[str, Admission], node: FakeNode
) -> None:
    url, admission = stopping
    node.gate = asyncio.Event()
    async with session.post(url + "/rpc", data=orjson.dumps(CHAT), headers=STREAM) as response:
        first = await response.content.readuntil(b"\n\n")
        assert b"inference.delta" in first
        admission.close()
        assert await session.get(url) is not None, "it answers others meanwhile"
        admission.end()
        (end,) = await events_of(response)
    assert end["error"]["data"]["kind"] == "draining"
    assert end["error"]["data"]["retryable"]
    assert end["id"] == "c-1"
