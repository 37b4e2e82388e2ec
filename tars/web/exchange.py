"""One HTTP exchange of a face that is not JSON-RPC: body in, deadline, counting, and an answer or an error in the face's own shape.

Law of this file: it knows HTTP and calls, and no face's messages. Whatever a handler does, the caller gets one answer, the call is
counted once, its work stops when the caller goes away, and nothing of an exception but its trace id leaves the process. Access (Host,
Origin, key, content type) was checked before, by `rpc.access`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from time import monotonic
from typing import Any, TypeVar, cast

import orjson
from aiohttp import hdrs, web
from pydantic import ValidationError

from tars.core.types import Deadline
from tars.errors import Cancelled, InternalError, InvalidParams, TarsError
from tars.messages.base import MAX_TIMEOUT_MS, CallContext, Message, Priority, fields_of
from tars.messages.inference import Delta, Progress
from tars.rpc.admission import Admission, internal_error, trace_id_of
from tars.rpc.envelope import load_json
from tars.rpc.event_stream import EventStream
from tars.rpc.http_server import arrival_of, read_body
from tars.rpc.options import RpcOptions
from tars.rpc.validation import faults
from tars.rpc.whole_answer import REQUEST_ID_HEADER
from tars.serving.service import NodeService

log = logging.getLogger(__name__)

PYTHON_TIMEOUT_HEADER = "X-Stainless-Read-Timeout"
"""The official OpenAI client for Python says here for how many seconds it waits for the next byte."""
NODE_TIMEOUT_HEADER = "X-Stainless-Timeout"
"""The one for JavaScript: for how many whole seconds, rounded down, it waits for the answer's headers."""
IDEMPOTENCY_HEADER = "Idempotency-Key"

_MAX_IDEMPOTENCY_KEY = 200
"""The bound of `_meta.idempotency_key`."""
_MAX_FAULTS = 10
"""As `rpc.validation`: a caller mends a call by its first faults."""

Json = dict[str, Any]
ErrorBody = Callable[[TarsError, str, str], Json]
"""`(error, node, trace_id)` -> the error as this face writes it."""
AiohttpHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ModelT = TypeVar("ModelT", bound=Message)
ResultT = TypeVar("ResultT")
BoundsT = TypeVar("BoundsT")


class Face:
    """One face: its name in logs, how it says an error, and the places that it shares with the others."""

    def __init__(
        self, name: str, service: NodeService, options: RpcOptions, admission: Admission, error_body: ErrorBody
    ):
        self.name = name
        self.service = service
        self.options = options
        self.admission = admission
        self._error_body = error_body

    def call(self, method: str, handler: Callable[[Exchange], Awaitable[web.StreamResponse]]) -> AiohttpHandler:
        """An aiohttp handler that counts each request as one call of `method`."""

        async def handle(request: web.Request) -> web.StreamResponse:
            exchange = Exchange(self, request, method)
            try:
                return await self._answered(exchange, handler)
            finally:
                exchange.count()
                self.service.call_ended(exchange.method, exchange.error, exchange.trace_id)

        return handle

    def look(self, handler: Callable[[Exchange], Awaitable[web.StreamResponse]]) -> AiohttpHandler:
        """An aiohttp handler for what only looks at the node (status, models): not counted, so that looking changes nothing."""

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._answered(Exchange(self, request, ""), handler)

        return handle

    def error_json(self, error: TarsError, trace_id: str) -> Json:
        """The error in this face's shape."""
        return self._error_body(error, self.service.node_id, trace_id)

    def error_response(self, error: TarsError, trace_id: str) -> web.Response:
        """The same as a response: the error's status, and what tells a client whether and when to try again."""
        headers = {
            hdrs.CACHE_CONTROL: "no-store",
            REQUEST_ID_HEADER: trace_id,
            # The OpenAI clients ask this before they look at the status: a model that failed for good is a 503 not worth repeating.
            "X-Should-Retry": "true" if error.retryable else "false",
        }
        if error.retry_after_ms is not None:
            headers[hdrs.RETRY_AFTER] = str(math.ceil(error.retry_after_ms / 1000))
            headers["Retry-After-Ms"] = str(error.retry_after_ms)
        return json_response(self.error_json(error, trace_id), status=error.http_status, headers=headers)

    async def _answered(
        self, exchange: Exchange, handler: Callable[[Exchange], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            response = await handler(exchange)
        except TarsError as error:
            exchange.error = error
            refused = self.error_response(error, exchange.trace_id)
            if not exchange.request.content.at_eof():
                # What was not read must not be taken for the next request.
                refused.force_close()
            return refused
        except web.HTTPException:
            raise
        except Exception:
            log.exception("%s met a fault of ours (trace %s)", exchange.request.path, exchange.trace_id)
            exchange.error = internal_error()
            return self.error_response(exchange.error, exchange.trace_id)
        except BaseException:
            exchange.error = caller_left()
            raise
        if not response.prepared:
            response.headers[REQUEST_ID_HEADER] = exchange.trace_id
        return response


class Exchange:
    """One request on its way through a face."""

    def __init__(self, face: Face, request: web.Request, method: str):
        self.face = face
        self.request = request
        self.method = method
        """May be set until the call is counted: /inference knows it only from the body."""
        self.trace_id = trace_id_of(request.headers.get("traceparent")) or face.admission.new_trace_id()
        self.error: TarsError | None = None
        self.priority: Priority | None = None
        """What the body says of it, which goes before the header; may be set until the call begins."""
        self._counted = False

    @property
    def service(self) -> NodeService:
        """The node."""
        return self.face.service

    async def json(self) -> Json:
        """The body, a JSON object. Raises `ParseError`, `LimitExceeded` or `InvalidParams`."""
        limits = self.face.options.envelope
        value = load_json(await read_body(self.request, limits.max_body_bytes), limits)
        if not isinstance(value, dict):
            raise InvalidParams("The body must be a JSON object; nothing was run.")
        return value

    async def message(self, model: type[ModelT]) -> ModelT:
        """The body as `model`. Raises as `json` does, and `InvalidParams` with every fault and its place."""
        return validated(model, await self.json())

    async def whole(self, work: Callable[[CallContext], Awaitable[ResultT]]) -> ResultT:
        """The result of `work`, within the node's bounds and the call's deadline."""
        async with self._within_bounds(streams=False) as call:
            return await work(call)

    async def stream(
        self, frames: Callable[[CallContext], AsyncGenerator[bytes, None]], error_frame: Callable[[TarsError], bytes]
    ) -> web.StreamResponse:
        """Send the frames of a call as server-sent events as they come, within the node's bounds and the call's deadline.

        The headers wait for the first frame, so that an error before it has its real status; a later one is sent as `error_frame`, and
        ends the stream. When the caller goes away the frames are closed, which stops the work.
        """
        return await self._send(self._within_bounds(streams=True), frames, error_frame)

    async def watch(
        self, frames: AsyncGenerator[bytes, None], error_frame: Callable[[TarsError], bytes]
    ) -> web.StreamResponse:
        """The same for frames that are no call and have no end: no deadline, and no place taken from calls."""
        return await self._send(nullcontext(), lambda _: frames, error_frame)

    def count(self) -> None:
        """Count the call, once."""
        if not self._counted:
            self._counted = True
            self.service.call_started(self.method)

    async def _send(
        self,
        bounds: AbstractAsyncContextManager[BoundsT],
        frames: Callable[[BoundsT], AsyncGenerator[bytes, None]],
        error_frame: Callable[[TarsError], bytes],
    ) -> web.StreamResponse:
        stream = EventStream(self.request, self.trace_id, self.face.options.heartbeat_seconds)
        try:
            try:
                async with bounds as within, aclosing(frames(within)) as source:
                    async for frame in source:
                        if not stream.opened:
                            await stream.open()
                        await stream.send(frame)
            except ConnectionError:
                raise
            except Exception as fault:
                if not stream.opened:
                    raise
                if not isinstance(fault, TarsError):
                    log.exception("%s met a fault of ours (trace %s)", self.request.path, self.trace_id)
                self.error = fault if isinstance(fault, TarsError) else internal_error()
                await stream.send(error_frame(self.error))
            await stream.end()
        except ConnectionError:
            # The caller closed the connection between two frames: nobody is left to tell.
            self.error = caller_left()
        finally:
            stream.close()
        return stream.response

    @asynccontextmanager
    async def _within_bounds(self, *, streams: bool) -> AsyncIterator[CallContext]:
        """Takes a place among the node's calls and holds the work to its deadline."""
        arrival = arrival_of(self.request)
        idempotency_key = self._idempotency_key()
        given = [] if arrival.timeout_ms is None else [arrival.timeout_ms]
        # It bounds the wait for the first byte (and each next one), so it says nothing of how long a stream may take in all.
        patience_ms = _patience_ms(self.request.headers)
        if not streams and patience_ms is not None:
            given.append(patience_ms)
        self.count()
        caller = arrival.caller
        async with self.face.admission.within_bounds(min(given, default=None), caller=caller) as deadline:
            yield CallContext(
                deadline=deadline,
                trace_id=self.trace_id,
                method=self.method,
                idempotency_key=idempotency_key,
                caller=caller,
                priority=self.priority or arrival.priority,
                first_by=None if patience_ms is None or not streams else Deadline(monotonic() + patience_ms / 1000),
                face=self.face.name,
                streamed=streams,
            )

    def _idempotency_key(self) -> str | None:
        key = self.request.headers.get(IDEMPOTENCY_HEADER)
        if key is not None and not 1 <= len(key) <= _MAX_IDEMPOTENCY_KEY:
            raise InvalidParams(f"{IDEMPOTENCY_HEADER} needs 1 to {_MAX_IDEMPOTENCY_KEY} characters; nothing was run.")
        return key


def validated(model: type[ModelT], value: Json) -> ModelT:
    """`value` as `model`; each fault and its place in `details["errors"]`."""
    try:
        return model.model_validate(value)
    except ValidationError as fault:
        raise invalid(model, value, fault) from None


def translated(translate: Callable[[], ResultT], body: Json) -> ResultT:
    """The result of turning a face's request into `tars.messages`; what those refuse is the caller's fault and said as such."""
    try:
        return translate()
    except ValidationError as fault:
        raise invalid(Message, body, fault) from None


def invalid(model: type[Message], value: Json, fault: ValidationError) -> InvalidParams:
    """What is wrong with `value`, for its sender."""
    listed = faults(model, value, fault)
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    place = f"{listed[0]['at']}: " if listed[0]["at"] else ""
    return InvalidParams(
        f"{place}{listed[0]['problem']}{more}. Nothing was run; correct the body and send it again.",
        details={"errors": listed[:_MAX_FAULTS]},
    )


def json_response(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON answer. What JSON cannot say (a lone surrogate) is a fault of ours and raises `InternalError`."""
    return web.Response(body=dump(body), status=status, headers=headers, content_type="application/json")


def dump(body: object) -> bytes:
    """JSON bytes; messages are written as their fields."""
    try:
        return orjson.dumps(body, default=fields_of)
    except (TypeError, ValueError, RecursionError):
        raise internal_error() from None


def event(body: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"" if name is None else b"event: %s\n" % name.encode()) + b"data: %s\n\n" % dump(body)


async def result_of(stream: AsyncIterator[Delta | Progress | ResultT]) -> ResultT:
    """What a stream of the service ends with; its pieces are dropped."""
    async with closing(stream) as items:
        async for item in items:
            if not isinstance(item, Delta | Progress):
                return item
    raise no_result()


def closing(stream: AsyncIterator[ResultT]) -> AbstractAsyncContextManager[AsyncIterator[ResultT]]:
    """`async with closing(stream) as items`: the service's stream is closed promptly whatever happens, which is what stops the GPU."""
    return aclosing(cast("AsyncGenerator[ResultT, None]", stream))


def caller_left() -> Cancelled:
    """For the count of calls: nobody is left to read it."""
    return Cancelled("The caller went away before the answer was complete; the work was stopped.")


def no_result() -> InternalError:
    """Of a stream that ended without one."""
    return InternalError("The model's answer ended without its result; report it with the trace id.")


def _patience_ms(headers: Mapping[str, str]) -> int | None:
    """For how long an OpenAI client waits, in ms; None where it does not say so in a number."""
    # "1" is up to two seconds; "0" is less than one.
    said = [(headers.get(PYTHON_TIMEOUT_HEADER), 0.0), (headers.get(NODE_TIMEOUT_HEADER), 1.0)]
    patience: list[float] = []
    for seconds, rounded in said:
        try:
            value = float(seconds) + rounded if seconds is not None else math.nan
        except ValueError:
            continue
        if 0 < value < math.inf and value >= rounded:
            patience.append(value)
    return min(max(1, int(min(patience) * 1000)), MAX_TIMEOUT_MS) if patience else None
