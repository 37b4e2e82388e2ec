"""`POST /rpc`: JSON-RPC over HTTP, and its streams as server-sent events.

Law of this file: HTTP only; what a call means is the dispatcher's. What was dispatched is answered with 200 whatever came of it,
and notifications with 204; a body of which nothing was run with its error's own status, and the same JSON error object in it.

A stream (`Accept: text/event-stream` on a single call whose method streams, or where JSON is not accepted) is one event per
JSON-RPC message: notifications, then the response with the call's id; an error after the stream began is that response. A batch is
never streamed: where only `text/event-stream` is accepted, it is refused. Closing the connection cancels the work.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from aiohttp import ClientPayloadError, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from tars.errors import Cancelled, DeadlineExceeded, InvalidRequest, ParseError, TarsError
from tars.messages.base import MAX_TIMEOUT_MS, Message, Priority
from tars.rpc.access import CALLER, ROLE, RenderError
from tars.rpc.admission import Admission, stopping
from tars.rpc.dispatcher import LOCAL, Arrival, Dispatcher
from tars.rpc.envelope import Call, Element, decode, encode_notification, too_large
from tars.rpc.event_stream import EventStream
from tars.rpc.method_table import METHODS, MethodSpec, Role
from tars.rpc.methods import handlers_of
from tars.rpc.options import RpcOptions
from tars.rpc.whole_answer import JSON_HEADERS, WholeAnswer
from tars.serving.service import NodeService

RPC_PATH = "/rpc"

PEER: web.RequestKey[str] = web.RequestKey("peer", str)
"""Where the mesh listener leaves the NodeId of the peer that sent a request."""
SOURCE: web.RequestKey[str] = web.RequestKey("source", str)
"""And the address of a stranger."""

_TIMEOUT_HEADER = "X-Request-Timeout-Ms"
_TRACE_HEADER = "traceparent"
_PRIORITY_HEADER = "X-Priority"
_EVENT_STREAM = "text/event-stream"
_BODY_SECONDS = 120.0
"""For a whole body: 8 MiB at half a megabit a second. Its call's own time begins after it."""


def add_rpc_routes(app: web.Application, service: NodeService, options: RpcOptions) -> Dispatcher:
    """Serve the whole method table at `/rpc`. The application's first middleware must be `access.access_middleware`."""
    dispatcher = Dispatcher(handlers_of(service), service, options)
    add_dispatcher(app, dispatcher, options)
    return dispatcher


def add_dispatcher(app: web.Application, dispatcher: Dispatcher, options: RpcOptions) -> None:
    """Serve a dispatcher at `/rpc`; every other HTTP method there is told what to do."""
    app.router.add_post(RPC_PATH, rpc_handler(dispatcher, options))
    app.router.add_route(hdrs.METH_ANY, RPC_PATH, _only_post(dispatcher))


def error_response(dispatcher: Dispatcher, error: TarsError, *, status: int | None = None) -> web.Response:
    """The JSON-RPC answer to a body of which nothing could be run."""
    response = web.Response(body=dispatcher.refusal(error), status=status or error.http_status, headers=JSON_HEADERS)
    if error.retry_after_ms is not None:
        response.headers[hdrs.RETRY_AFTER] = str(math.ceil(error.retry_after_ms / 1000))
    return response


def closing_middleware(admission: Admission) -> Middleware:
    """Once the node stops, each connection ends with its answer: a client's next call goes to a node that stays, or finds this one back."""

    @web.middleware
    async def close(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if admission.closed and not response.prepared:
            response.force_close()
        return response

    return close


def refusal_renderer(dispatcher: Dispatcher, others: RenderError | None = None) -> RenderError:
    """How `access_middleware` says no: as JSON-RPC at `/rpc` (and everywhere, where there is no other face), elsewhere as `others` do."""

    def render(request: web.Request, error: TarsError) -> web.StreamResponse:
        if others is None or request.path == RPC_PATH:
            return error_response(dispatcher, error)
        return others(request, error)

    return render


def rpc_handler(dispatcher: Dispatcher, options: RpcOptions) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler of `POST /rpc`."""
    limits = options.envelope

    async def handle(request: web.Request) -> web.StreamResponse:
        headers = request.headers
        try:
            body = await read_body(request, limits.max_body_bytes)
            decoded = decode(body, limits)
            arrival = arrival_of(request)
        except TarsError as error:
            response = error_response(dispatcher, error)
            if not request.content.at_eof():
                # What was not read must not be taken for the next request.
                response.force_close()
            return response
        if dispatcher.admission.closed and _is_inference(decoded):
            return error_response(dispatcher, stopping())
        accept = headers.get(hdrs.ACCEPT)
        if accept is not None and _EVENT_STREAM in accept:
            json_too = "application/json" in accept or "*/*" in accept
            if isinstance(decoded, list):
                if not json_too:
                    refused = InvalidRequest(
                        "Invalid Request: a batch is not streamed, so nothing was run. Send each call that you want streamed in a "
                        "request of its own, or accept application/json."
                    )
                    return error_response(dispatcher, refused, status=406)
            elif not decoded.notification and (not json_too or _streams(decoded)):
                return await _stream(request, dispatcher, decoded, arrival, options.heartbeat_seconds)
        call_id = ""  # a batch's calls have one each, which their results and errors tell
        if isinstance(decoded, list):
            answer = await dispatcher.answer_batch(decoded, arrival)
        else:
            call_id = dispatcher.call_id(decoded, arrival)
            answer = await dispatcher.answer(decoded, arrival, call_id=call_id)
        if answer is None:
            return web.Response(status=204)
        return WholeAnswer(answer, call_id)

    return handle


def _streams(element: Element) -> bool:
    return isinstance(element, Call) and element.method in METHODS and METHODS[element.method].streams


def _is_inference(decoded: Element | list[Element]) -> bool:
    return isinstance(decoded, Call) and decoded.method in METHODS and METHODS[decoded.method].is_inference


def _only_post(dispatcher: Dispatcher) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def refuse(request: web.Request) -> web.Response:
        error = InvalidRequest(
            'Invalid Request: /rpc takes POST with a JSON-RPC 2.0 call, such as {"jsonrpc": "2.0", "method": "node.ping", "id": 1}.'
        )
        response = error_response(dispatcher, error, status=405)
        response.headers[hdrs.ALLOW] = "POST"
        return response

    return refuse


async def read_body(request: web.Request, limit: int, seconds: float = _BODY_SECONDS) -> bytes:
    """The body, decompressed, at most `limit` bytes: reading stops there, whatever Content-Length promised, and
    after `seconds`. Raises `TarsError`."""
    content = request.content
    read = bytearray()
    try:
        if content.is_eof():
            # It came whole with the headers, as small ones do: nothing to wait for.
            return content.read_nowait()
        length = request.content_length
        if length is not None and length > limit:
            raise too_large(limit, length)
        async with asyncio.timeout(seconds):
            while chunk := await content.readany():
                read += chunk
                if len(read) > limit:
                    raise too_large(limit, None)
    except TimeoutError:
        raise DeadlineExceeded(
            f"The body did not arrive within {seconds:g} s, so nothing was run. Send it faster, or less at once."
        ) from None
    except (HttpProcessingError, ClientPayloadError, web.RequestPayloadError):
        raise ParseError(
            "Parse error: the body does not follow its Transfer-Encoding, so nothing was run. Send it again."
        ) from None
    return bytes(read)


def arrival_of(request: web.Request) -> Arrival:
    """Who sent it, with how much time and in which trace, as the headers say. Raises `InvalidRequest`."""
    headers = request.headers
    caller, role = request.get(CALLER, "local"), request.get(ROLE, Role.CLIENT)
    timeout = headers.get(_TIMEOUT_HEADER)
    trace = headers.get(_TRACE_HEADER)
    priority = headers.get(_PRIORITY_HEADER)
    if timeout is None and trace is None and priority is None and caller == "local" and role is Role.ADMINISTRATOR:
        return LOCAL
    timeout_ms = None
    if timeout is not None:
        if not (
            timeout.isascii() and timeout.isdigit() and 1 <= int(timeout[:9]) <= MAX_TIMEOUT_MS and len(timeout) < 9
        ):
            raise InvalidRequest(
                f"Invalid Request: {_TIMEOUT_HEADER} must be a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS}, so nothing "
                "was run."
            )
        timeout_ms = int(timeout)
    return Arrival(
        caller,
        timeout_ms,
        trace,
        role=role,
        peer=request.get(PEER),
        source=request.get(SOURCE, ""),
        priority=None if priority is None else _priority(priority),
    )


def _priority(said: str) -> Priority:
    match said.strip().lower():
        case "interactive":
            return "interactive"
        case "batch":
            return "batch"
    raise InvalidRequest(f"Invalid Request: {_PRIORITY_HEADER} must be interactive or batch, so nothing was run.")


async def _stream(
    request: web.Request, dispatcher: Dispatcher, element: Element, arrival: Arrival, heartbeat_seconds: float
) -> web.StreamResponse:
    """Answer one call as an event stream."""
    call_id = dispatcher.call_id(element, arrival)
    stream = EventStream(request, call_id, heartbeat_seconds)

    async def emit(spec: MethodSpec, delta: Message) -> None:
        name = (spec.delta_notification if type(delta) is spec.delta else spec.progress_notification) or spec.name
        frame = b"data: " + encode_notification(name, element.id, delta) + b"\n\n"
        try:
            await stream.send(frame)
        except ConnectionError:
            raise Cancelled("The caller closed the stream; the work was stopped.") from None

    await stream.open()
    try:
        answer = await dispatcher.answer(element, arrival, emit, call_id)
        if answer is not None:
            await stream.end(b"data: " + answer + b"\n\n")
    except (Cancelled, ConnectionError):
        pass  # the reader went away between the last delta and the response: there is nobody to tell
    finally:
        stream.close()
    return stream.response
