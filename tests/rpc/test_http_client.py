"""The calling side: what comes back is checked, and everything that goes wrong is one of the tree's errors."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web
from fake_node import FakeNode
from raw_server import raw_server, silent

from tars.errors import (
    BadPeerAnswer,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    MethodNotFound,
    NotAMember,
    PeerUnreachable,
    StillLoading,
    TarsError,
    Unauthorized,
)
from tars.rpc.http_client import BatchCall, NodeNotReachable, NotTls, RpcConnection, _distrust
from tars.rpc.listener import Listener
from tars.rpc.options import AccessOptions, EnvelopeLimits, RpcOptions

Serve = Callable[..., Awaitable[Listener]]


async def collect(connection: RpcConnection, seen: list[Any] | None = None, timeout: float | None = None) -> None:
    """Read a streamed chat to its end."""
    async for event in connection.stream("inference.chat", CHAT, timeout=timeout):
        if seen is not None:
            seen.append(event)


async def once(connection: RpcConnection, streamed: bool, timeout: float | None = None) -> None:
    """One call, streamed or not."""
    if streamed:
        await collect(connection, timeout=timeout)
    else:
        await connection.call("node.ping", timeout=timeout)


CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def connection(url: str) -> AsyncIterator[RpcConnection]:
    async with RpcConnection(url) as one:
        yield one


async def test_a_call_gives_the_result_and_carries_the_budget(connection: RpcConnection, node: FakeNode) -> None:
    assert (await connection.call("node.ping"))["node"] == "node-1"
    before = asyncio.get_running_loop().time()
    await connection.call("inference.chat", CHAT, timeout=7, idempotency_key="k-1")
    assert 6 < node.contexts[0].deadline.at - before < 8
    assert node.contexts[0].idempotency_key == "k-1"


async def test_an_error_comes_back_as_its_class(connection: RpcConnection, node: FakeNode) -> None:
    node.error = StillLoading("wait", retry_after_ms=250, details={"stage": "read", "percent": 10.0})
    with pytest.raises(StillLoading) as raised:
        await connection.call("inference.chat", CHAT)
    assert (raised.value.retry_after_ms, raised.value.details) == (250, {"stage": "read", "percent": 10.0})
    with pytest.raises(MethodNotFound):
        await connection.call("node.pong")


async def test_a_batch_keeps_its_order_and_each_outcome(connection: RpcConnection, node: FakeNode) -> None:
    outcomes = await connection.batch(
        [
            BatchCall("node.ping"),
            BatchCall("node.drain", notification=True),
            BatchCall("nope"),
            BatchCall("inference.tokenize", {"text": "a"}),
        ]
    )
    assert outcomes[0]["node"] == "node-1"
    assert outcomes[1] is None
    assert isinstance(outcomes[2], MethodNotFound)
    assert outcomes[3]["tokens"] == [1, 2]
    assert await connection.batch([]) == []
    assert await connection.batch([BatchCall("node.ping", notification=True)]) == [None]
    with pytest.raises(LimitExceeded):
        await connection.batch([BatchCall("node.ping")] * 1000)


async def test_a_stream_gives_deltas_then_the_result(connection: RpcConnection) -> None:
    events = [event async for event in connection.stream("inference.chat", CHAT)]
    assert [(name, payload["text"]) for name, payload in events[:-1]] == [
        ("inference.delta", "Hel"),
        ("inference.delta", "lo"),
    ]
    assert (events[-1][0], events[-1][1]["message"]["content"]) == (None, "Hello")


async def test_an_error_in_a_stream_is_raised_from_it(connection: RpcConnection, node: FakeNode) -> None:
    node.late_error = StillLoading("gone")
    seen: list[Any] = []
    with pytest.raises(StillLoading):
        await collect(connection, seen)
    assert len(seen) == 2


async def test_leaving_a_stream_cancels_the_work(connection: RpcConnection, node: FakeNode) -> None:
    node.gate = asyncio.Event()
    events = connection.stream("inference.chat", CHAT)
    async with asyncio.timeout(5):
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]  # an async generator
        await node.closed.wait()
        await node.ended_one.wait()
    error = node.ended[0][1]
    assert isinstance(error, Cancelled)


async def test_the_callers_own_work_between_deltas_is_not_timed_out(
    connection: RpcConnection, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars.rpc.http_client._GRACE_SECONDS", 0.0)
    node.gate = asyncio.Event()
    events = connection.stream("inference.chat", CHAT, timeout=0.05)
    await anext(events)
    await asyncio.sleep(0.1)  # the caller's own work, longer than the budget: nobody cancels it
    with pytest.raises(DeadlineExceeded):
        await anext(events)


async def test_a_key_is_sent_and_a_missing_one_is_unauthorized(serve: Serve) -> None:
    key = "correct-horse-battery"
    url = (await serve(RpcOptions(access=AccessOptions(api_keys={"ci": key})))).url
    async with RpcConnection(url, api_key=key) as right, RpcConnection(url + "/rpc/") as without:
        assert (await right.call("node.ping"))["state"] == "ready"
        with pytest.raises(Unauthorized):
            await without.call("node.ping")


async def test_a_body_that_was_refused_whole_raises_its_error(serve: Serve) -> None:
    url = (await serve(RpcOptions(envelope=EnvelopeLimits(max_body_bytes=1000)))).url
    async with RpcConnection(url) as connection:
        with pytest.raises(LimitExceeded):
            await connection.call("inference.tokenize", {"text": "x" * 5000})


async def test_nobody_there_is_peer_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        async with RpcConnection(f"http://127.0.0.1:{taken.getsockname()[1]}") as connection:
            with pytest.raises(PeerUnreachable, match="tars-node"):
                await connection.call("node.ping")
            with pytest.raises(PeerUnreachable):
                await anext(connection.stream("inference.chat", CHAT))


async def test_params_that_are_no_json_are_a_type_error_before_anything_is_sent(
    connection: RpcConnection, node: FakeNode
) -> None:
    for wrong in ({"a": object()}, {"a": "\ud800"}, {"a": 2**70}):
        with pytest.raises(TypeError, match="must be JSON"):
            await connection.call("node.ping", wrong)
    assert node.started == []


Answering = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def peer() -> AsyncIterator[Callable[[Answering], Awaitable[RpcConnection]]]:
    """`await peer(handler)`: a connection to a server that answers as the test says."""
    opened: list[Any] = []

    async def start(handler: Answering) -> RpcConnection:
        app = web.Application()
        app.router.add_post("/rpc", handler)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        connection = RpcConnection(f"http://127.0.0.1:{runner.addresses[0][1]}")
        opened.append((connection, runner))
        return connection

    yield start
    for connection, runner in opened:
        await connection.close()
        await runner.cleanup()


Peer = Callable[[Answering], Awaitable[RpcConnection]]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>It works!</html>",
        b"null",
        b"[]",
        b"{}",
        b'{"jsonrpc":"1.0","result":1,"id":1}',
        b'{"jsonrpc":"2.0","id":1}',
        b'{"jsonrpc":"2.0","result":1,"error":{"code":1,"message":""},"id":1}',
        b'{"jsonrpc":"2.0","result":1,"id":2}',
        b'{"jsonrpc":"2.0","result":1,"id":"1"}',
        b'{"jsonrpc":"2.0","result":1,"id":null}',
        b'{"jsonrpc":"2.0","result":1}',
        b'{"jsonrpc":"2.0","error":1,"id":1}',
        b'{"jsonrpc":"2.0","error":{"code":"x","message":"m"},"id":1}',
        b'{"jsonrpc":"2.0","error":{"code":1},"id":1}',
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_that_is_none_is_a_bad_peer_answer(peer: Peer, answer: bytes, streamed: bool) -> None:
    async def handle(request: web.Request) -> web.Response:
        if streamed:
            return web.Response(body=b"data: " + answer + b"\n\n", content_type="text/event-stream")
        return web.Response(body=answer)

    connection = await peer(handle)
    with pytest.raises(BadPeerAnswer):
        await once(connection, streamed)


@pytest.mark.parametrize(
    "answers",
    [
        [{"jsonrpc": "2.0", "result": 1, "id": 1}],
        [{"jsonrpc": "2.0", "result": 1, "id": 1}] * 2,
        [{"jsonrpc": "2.0", "result": 1, "id": number} for number in (1, 2, 3)],
        [{"jsonrpc": "2.0", "result": 1, "id": 1}, 5],
        {"jsonrpc": "2.0", "result": 1, "id": 1},
    ],
)
async def test_a_batch_whose_answers_are_not_its_calls_is_a_bad_peer_answer(peer: Peer, answers: object) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(answers))

    connection = await peer(handle)
    with pytest.raises(BadPeerAnswer):
        await connection.batch([BatchCall("node.ping"), BatchCall("node.ping")])


@pytest.mark.parametrize("status", [200, 502])
async def test_the_status_does_not_matter_where_the_answer_is_one(peer: Peer, status: int) -> None:
    async def handle(request: web.Request) -> web.Response:
        sent = orjson.loads(await request.read())
        error = StillLoading("wait").to_json()
        return web.Response(status=status, body=orjson.dumps({"jsonrpc": "2.0", "error": error, "id": sent["id"]}))

    with pytest.raises(StillLoading):
        await (await peer(handle)).call("node.ping")


async def test_a_redirect_is_not_followed_with_the_key(peer: Peer) -> None:
    async def handle(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("http://127.0.0.1:1/rpc")

    with pytest.raises(BadPeerAnswer):
        await (await peer(handle)).call("node.ping")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_connection_that_breaks_midway_is_peer_unreachable(peer: Peer, streamed: bool) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream" if streamed else "application/json"})
        await response.prepare(request)
        await response.write(b'data: {"jsonrpc":"2.0","method":"inference.delta","params":{"id":1,"text":"a"}}\n\n')
        assert request.transport is not None
        request.transport.abort()
        return response

    connection = await peer(handle)
    with pytest.raises(PeerUnreachable):
        await once(connection, streamed)


@pytest.mark.parametrize("late", [False, True])
async def test_a_stream_that_was_read_to_its_end_leaves_its_connection_to_the_next(peer: Peer, late: bool) -> None:
    connections = set()
    answered = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        connections.add(id(request.protocol))
        number = (await request.json())["id"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"jsonrpc":"2.0","result":1,"id":%d}\n\n' % number)
        if late:
            await answered.wait()
            answered.clear()
        await response.write_eof()
        return response

    connection = await peer(handle)
    for _ in range(5):
        async for event in connection.stream("inference.chat", CHAT):
            assert event == (None, 1)
            answered.set()  # the end comes when the answer is there
    assert len(connections) == 1


async def test_an_end_that_does_not_come_costs_the_answer_nothing_and_the_reader_a_moment(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars.rpc.http_client._END_SECONDS", 0.05)

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"jsonrpc":"2.0","result":1,"id":1}\n\n')
        await asyncio.Event().wait()
        return response

    events = [event async for event in (await peer(handle)).stream("inference.chat", CHAT)]
    assert events == [(None, 1)]


async def test_a_stream_that_ends_without_a_response_is_peer_unreachable(peer: Peer) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=b": hello\n\n", content_type="text/event-stream")

    with pytest.raises(PeerUnreachable):
        await anext((await peer(handle)).stream("inference.chat", CHAT))


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_peer_that_says_nothing_costs_the_budget_and_no_more(
    peer: Peer, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tars.rpc.http_client._GRACE_SECONDS", 0.0)

    async def handle(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    connection = await peer(handle)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(once(connection, streamed, timeout=0.05), 5)


async def test_an_answer_without_bound_is_cut_off(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tars.rpc.http_client._MAX_ANSWER_BYTES", 1000)
    monkeypatch.setattr("tars.rpc.http_client._MAX_EVENT_BYTES", 1000)

    async def handle(request: web.Request) -> web.Response:
        kind = "text/event-stream" if "event-stream" in request.headers["Accept"] else "application/json"
        return web.Response(body=b"x" * 5000, content_type=kind)

    connection = await peer(handle)
    with pytest.raises(BadPeerAnswer):
        await connection.call("node.ping")
    with pytest.raises(BadPeerAnswer):
        await anext(connection.stream("inference.chat", CHAT))


async def test_events_may_be_cut_anywhere(peer: Peer) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        delta = '{"jsonrpc":"2.0","method":"inference.delta","params":{"id":1,"text":"wörld"}}'
        whole = f': comment\n\nevent: message\ndata: {delta}\n\ndata:{{"jsonrpc":"2.0","result":7,"id":1}}\n\n'.encode()
        for byte in whole:
            await response.write(bytes([byte]))
        return response

    events = [event async for event in (await peer(handle)).stream("inference.chat", CHAT)]
    assert events == [("inference.delta", {"text": "wörld"}), (None, 7)]


async def test_every_error_of_a_broken_peer_is_of_the_tree(peer: Peer) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=b'{"jsonrpc":"2.0","error":{"code":-32600,"message":"no"},"id":null}', status=400)

    with pytest.raises(TarsError) as raised:
        await (await peer(handle)).call("node.ping")
    assert raised.value.message == "no"
    assert not isinstance(raised.value, InvalidRequest)  # the peer named no kind
    assert raised.value.code == -32600


# --- a peer's: TLS, GET ---------------------------------------------------------------------------------------------------


async def test_a_path_of_the_same_node_is_read_as_it_comes(url: str) -> None:
    async with RpcConnection(url) as connection, connection.get("/health", {"X-Any": "1"}) as response:
        assert response.status == 200
        assert orjson.loads(await response.read()) == {"caller": "local"}


async def test_a_path_that_does_not_answer_ends_in_time() -> None:
    held = asyncio.Event()

    async def hold(request: web.Request) -> web.Response:
        await held.wait()
        return web.Response()

    app = web.Application()
    app.router.add_get("/slow", hold)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with RpcConnection(f"http://127.0.0.1:{runner.addresses[0][1]}") as connection:
            with pytest.raises(DeadlineExceeded):
                async with connection.get("/slow", timeout=0.1):
                    pass
    finally:
        held.set()
        await runner.cleanup()


async def test_a_path_where_nobody_listens_is_a_peer_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with RpcConnection(f"http://127.0.0.1:{port}") as connection:
        with pytest.raises(PeerUnreachable):
            async with connection.get("/x"):
                pass


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def test_plain_http_where_tls_was_expected_is_named(url: str) -> None:
    async with RpcConnection(url.replace("http:", "https:"), tls=unverified()) as connection:
        with pytest.raises(NotTls, match="does not speak TLS"):
            await connection.call("node.ping")


async def test_whoever_takes_the_connection_and_does_not_shake_hands_costs_the_connects_time_only() -> None:
    async with (
        asyncio.timeout(10),
        raw_server(silent) as port,
        RpcConnection(f"https://127.0.0.1:{port}", tls=unverified(), handshake_seconds=0.1) as connection,
    ):
        with pytest.raises(NodeNotReachable, match=r"shakes hands within 0\.1 s"):
            await connection.call("node.ping", timeout=60)


@pytest.mark.parametrize(
    ("code", "words"), [(9, "not valid yet"), (10, "has expired"), (20, "not signed by this mesh's CA")]
)
def test_a_certificate_that_is_refused_says_why_in_words(code: int, words: str) -> None:
    fault = ssl.SSLCertVerificationError("certificate verify failed")
    fault.verify_code = code
    told = _distrust(fault, "https://box:8001")
    assert isinstance(told, NotAMember)
    assert words in told.message
    assert "https://box:8001" in told.message
    assert _distrust(OSError("other"), "https://box:8001") is None


# --- a peer that vanished without a word ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux's")
async def test_a_connection_to_a_peer_is_watched_by_the_kernel_and_a_clients_is_not(url: str) -> None:
    """That it ends then, and the call with it, is tried over a cut cable: tests/test_mesh_network.py."""
    for seconds, watched in ((5.0, (1, 5000, 2, 1)), (None, (None, 0, None, None))):
        async with RpcConnection(url, silent_seconds=seconds) as connection:
            await connection.call("node.ping")
            assert connection._session is not None
            assert connection._session.connector is not None
            (kept,) = next(iter(connection._session.connector._conns.values()))  # type: ignore[attr-defined]  # aiohttp's pool
            found = kept[0].transport.get_extra_info("socket")
            keepalive, timeout, idle, between = watched
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == timeout
            if idle is not None:
                assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == keepalive
                assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
                assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == between
