"""An answer in one piece says the same as aiohttp's own, and gives way to it wherever something was added."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import parsedate_to_datetime

import aiohttp
import pytest
from aiohttp import web

from tars.rpc.whole_answer import WholeAnswer

BODY = b'{"answer":42}'


@pytest.fixture
async def answered() -> AsyncIterator[Callable[..., Awaitable[bytes]]]:
    """`await answered(change, request, body)`: the raw bytes that a server sends whose handler changed the answer."""
    runners: list[web.AppRunner] = []

    async def ask(
        change: Callable[[WholeAnswer], object] = lambda answer: None,
        request: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        body: bytes = BODY,
        signal: bool = False,
        call_id: str = "",
    ) -> bytes:
        async def handle(request: web.Request) -> WholeAnswer:
            answer = WholeAnswer(body, call_id)
            change(answer)
            return answer

        async def mark(request: web.Request, response: web.StreamResponse) -> None:
            response.headers["X-Signal"] = "yes"

        app = web.Application()
        app.router.add_get("/", handle)
        if signal:
            app.on_response_prepare.append(mark)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
        writer.write(request)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"HEAD"):
                # The next answer follows at once, or a body stood between.
                writer.write(request)
                read = await reader.readuntil(b"\r\n\r\n")
                assert read.startswith(b"HTTP/1.1 200")
            else:
                read = await reader.readexactly(len(body))
        writer.close()
        return head + read

    yield ask
    for runner in runners:
        await runner.cleanup()


async def test_it_is_a_complete_http_answer(answered: Callable[..., Awaitable[bytes]]) -> None:
    head, _, body = (await answered()).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert (status, body) == ("HTTP/1.1 200 OK", BODY)
    assert (fields["Content-Type"], fields["Content-Length"]) == ("application/json", str(len(BODY)))
    assert parsedate_to_datetime(fields["Date"]).tzinfo is not None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda answer: answer.headers.update({"X-More": "yes"}), b"X-More: yes"),
        (lambda answer: answer.set_status(503), b"HTTP/1.1 503"),
        (lambda answer: answer.set_cookie("a", "b"), b"Set-Cookie: a=b"),
        (lambda answer: answer.force_close(), b"Connection: close"),
        (lambda answer: setattr(answer, "body", b'{"answer":43}'), b'{"answer":43}'),
    ],
)
async def test_what_was_added_is_sent(
    answered: Callable[..., Awaitable[bytes]], change: Callable[[WholeAnswer], object], expected: bytes
) -> None:
    assert expected in await answered(change)


@pytest.mark.parametrize("whole", [True, False])
async def test_the_id_of_its_call_goes_with_it(answered: Callable[..., Awaitable[bytes]], whole: bool) -> None:
    said = await answered(call_id="0a" * 16, signal=not whole)
    assert said.count(b"X-Request-Id: " + b"0a" * 16 + b"\r\n") == 1
    assert said.endswith(b"\r\n\r\n" + BODY)
    # In one piece, or in aiohttp's way.
    assert (b"Server:" in said) is not whole


async def test_a_signal_of_the_application_is_heard(answered: Callable[..., Awaitable[bytes]]) -> None:
    assert b"X-Signal: yes" in await answered(signal=True)


async def test_http_1_0_and_a_closing_connection_are_answered_in_their_way(
    answered: Callable[..., Awaitable[bytes]],
) -> None:
    assert (await answered(request=b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.0 200")
    closing = await answered(request=b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"Connection: close" in closing


async def test_head_is_answered_without_the_body(answered: Callable[..., Awaitable[bytes]]) -> None:
    two = b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert (await answered(request=two)).endswith(b"\r\n\r\n")


async def test_a_large_answer_arrives_whole(answered: Callable[..., Awaitable[bytes]]) -> None:
    body = b"[" + b"1," * 200_000 + b"1]"
    assert (await answered(body=body)).endswith(body)


async def test_many_answers_follow_on_one_connection() -> None:
    async def handle(request: web.Request) -> WholeAnswer:
        return WholeAnswer(await request.read())

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            for number in range(50):
                body = b"%d" % number
                async with session.post(f"http://127.0.0.1:{runner.addresses[0][1]}/", data=body) as response:
                    assert await response.read() == body
        assert runner.server is not None
        assert runner.server.requests_count == 50
    finally:
        await runner.cleanup()
