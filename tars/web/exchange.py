"""One HTTP exchange of a face that is not JSON-RPC: body in, deadline, counting, and an answer or an error in the face's own shape.

Law of this file: it knows HTTP and calls, and no face's messages. Whatever a handler does, the caller gets one answer, the call is
counted once, its work stops when the caller goes away, and nothing of an exception but its trace id leaves the process. Access (Host,
Origin, key, content type) was checked before, by `rpc.access`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext, suppress
from time import monotonic
from typing import Any, TypeVar, cast

import orjson
from aiohttp import hdrs, web
from pydantic import ValidationError

from tars.core.types import Deadline
from tars.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidParams,
    LimitExceeded,
    Overloaded,
    ParseError,
    TarsError,
)
from tars.messages.base import CallContext, Message
from tars.rpc.access import CALLER
from tars.rpc.options import RpcOptions
from tars.rpc.validation import faults
from tars.serving.service import NodeService

log = logging.getLogger(__name__)

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
OPENAI_TIMEOUT_HEADER = "X-Stainless-Read-Timeout"
"""The official OpenAI clients say here for how many seconds they wait for the next byte."""
IDEMPOTENCY_HEADER = "Idempotency-Key"
REQUEST_ID_HEADER = "X-Request-Id"
"""Carries the trace id; the OpenAI clients show it as `_request_id`."""

SSE_HEADERS = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-store",
    # nginx and its kin would otherwise collect the answer and pass it on at its end.
    "X-Accel-Buffering": "no",
}

MAX_TIMEOUT_MS = 86_400_000
"""A day, as `_meta.timeout_ms` is bounded."""
_RETRY_AFTER_MS = 1000
"""A place is free again within about one short answer."""
_MAX_IDEMPOTENCY_KEY = 200
"""The bound of `_meta.idempotency_key`."""
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
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
    """One face: its name in logs, how it says an error, and the bound on its calls under way."""

    def __init__(self, name: str, service: NodeService, options: RpcOptions, error_body: ErrorBody):
        self.name = name
        self.service = service
        self.options = options
        self._error_body = error_body
        self.active = 0

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
            return self.error_response(error, exchange.trace_id)
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
        self.trace_id = _trace_id(request.headers.get("traceparent")) or secrets.token_hex(16)
        self.error: TarsError | None = None
        self._counted = False

    @property
    def service(self) -> NodeService:
        """The node."""
        return self.face.service

    async def json(self) -> Json:
        """The body, a JSON object. Raises `ParseError`, `LimitExceeded` or `InvalidParams`."""
        return parse_object(await self._body(), self.face.options)

    async def message(self, model: type[ModelT]) -> ModelT:
        """The body as `model`. Raises as `json` does, and `InvalidParams` with every fault and its place."""
        return validated(model, await self.json())

    async def whole(self, work: Callable[[CallContext], Awaitable[ResultT]], timeout_ms: int | None = None) -> ResultT:
        """The result of `work`, within the node's bounds and the call's deadline."""
        async with self._within_bounds(timeout_ms, streams=False) as call:
            return await work(call)

    async def stream(
        self, frames: Callable[[CallContext], AsyncGenerator[bytes, None]], error_frame: Callable[[TarsError], bytes]
    ) -> web.StreamResponse:
        """Send the frames of a call as server-sent events as they come, within the node's bounds and the call's deadline.

        The headers wait for the first frame, so that an error before it has its real status; a later one is sent as `error_frame`, and
        ends the stream. When the caller goes away the frames are closed, which stops the work.
        """
        return await self._send(self._within_bounds(None, streams=True), frames, error_frame)

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
        response = web.StreamResponse(headers={**SSE_HEADERS, REQUEST_ID_HEADER: self.trace_id})
        heart: asyncio.Task[None] | None = None
        try:
            try:
                async with bounds as within, aclosing(frames(within)) as source:
                    async for frame in source:
                        if heart is None:
                            await response.prepare(self.request)
                            heart = asyncio.create_task(beat(response, self.face.options.heartbeat_seconds))
                        await response.write(frame)
            except ConnectionError:
                raise
            except Exception as fault:
                if not response.prepared:
                    raise
                if not isinstance(fault, TarsError):
                    log.exception("%s met a fault of ours (trace %s)", self.request.path, self.trace_id)
                self.error = fault if isinstance(fault, TarsError) else internal_error()
                await response.write(error_frame(self.error))
            await response.write_eof()
        except ConnectionError:
            # The caller closed the connection between two frames: nobody is left to tell.
            self.error = caller_left()
        finally:
            if heart is not None:
                heart.cancel()
        return response

    @asynccontextmanager
    async def _within_bounds(self, timeout_ms: int | None, *, streams: bool) -> AsyncIterator[CallContext]:
        """Takes a place among the face's calls and holds the work to its deadline."""
        options = self.face.options
        if self.face.active >= options.max_concurrent_calls:
            raise Overloaded(
                f"This node already runs {self.face.active} calls, its limit, so the call was not started. Send it again a little "
                "later, or raise limits.max_concurrent_calls.",
                retry_after_ms=_RETRY_AFTER_MS,
                details={"limit": options.max_concurrent_calls},
            )
        seconds = self._budget_ms(timeout_ms, streams=streams) / 1000
        call = CallContext(
            deadline=Deadline(monotonic() + seconds),
            trace_id=self.trace_id,
            method=self.method,
            idempotency_key=self._idempotency_key(),
            caller=self.request.get(CALLER, "local"),
            face=self.face.name,
        )
        self.count()
        self.face.active += 1
        try:
            async with asyncio.timeout(seconds) as limit:
                yield call
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"The call did not end within its {seconds:g} s, so the work was stopped. Give it more with the header "
                f"{TIMEOUT_HEADER}, or ask for less."
            ) from None
        finally:
            self.face.active -= 1

    def _budget_ms(self, timeout_ms: int | None, *, streams: bool) -> int:
        options = self.face.options
        given = [] if timeout_ms is None else [timeout_ms]
        headers = self.request.headers
        if (said := _milliseconds(headers.get(TIMEOUT_HEADER), 1)) is not None:
            given.append(said)
        # It bounds the wait for the next byte, so it says nothing of how long a stream may take in all.
        if not streams and (said := _milliseconds(headers.get(OPENAI_TIMEOUT_HEADER), 1000)) is not None:
            given.append(said)
        return min(*given, MAX_TIMEOUT_MS) if given else options.default_timeout_ms

    def _idempotency_key(self) -> str | None:
        key = self.request.headers.get(IDEMPOTENCY_HEADER)
        if key is not None and not 1 <= len(key) <= _MAX_IDEMPOTENCY_KEY:
            raise InvalidParams(f"{IDEMPOTENCY_HEADER} needs 1 to {_MAX_IDEMPOTENCY_KEY} characters; nothing was run.")
        return key

    async def _body(self) -> bytes:
        limit = self.face.options.envelope.max_body_bytes
        declared = self.request.content_length
        if declared is not None and declared > limit:
            raise _too_large(limit, declared)
        body = bytearray()
        async for chunk in self.request.content.iter_any():
            body += chunk
            if len(body) > limit:
                raise _too_large(limit, None)
        return bytes(body)


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
        return orjson.dumps(body, default=_fields)
    except (TypeError, ValueError, RecursionError):
        raise internal_error() from None


def event(body: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"" if name is None else b"event: %s\n" % name.encode()) + b"data: %s\n\n" % dump(body)


async def beat(response: web.StreamResponse, seconds: float) -> None:
    """A comment now and then: readers of event streams skip it, no proxy closes a silent stream, and a lost connection is noticed."""
    with suppress(ConnectionError):
        while True:
            await asyncio.sleep(seconds)
            await response.write(b": still here\n\n")


async def closing(stream: AsyncIterator[ResultT]) -> AsyncGenerator[ResultT, None]:
    """The same items; the service's stream is closed promptly whatever happens, which is what stops the GPU."""
    async with aclosing(cast("AsyncGenerator[ResultT, None]", stream)) as items:
        async for item in items:
            yield item


def parse_object(body: bytes, options: RpcOptions) -> Json:
    """A JSON object within the bounds of `options.envelope`."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as fault:
        raise ParseError(
            "The body is not JSON in UTF-8, so nothing was run. Correct it and send it again.",
            details={"line": fault.lineno, "column": fault.colno},
        ) from None
    if not isinstance(value, dict):
        raise InvalidParams("The body must be a JSON object; nothing was run.")
    return value


def internal_error() -> InternalError:
    """What a caller hears of a bug of ours."""
    return InternalError(
        "The node met a fault of its own; the call may or may not have had an effect. Report it with the trace id."
    )


def caller_left() -> Cancelled:
    """For the count of calls: nobody is left to read it."""
    return Cancelled("The caller went away before the answer was complete; the work was stopped.")


def _too_large(limit: int, actual: int | None) -> LimitExceeded:
    return LimitExceeded(
        f"The body is larger than the {limit:,} bytes that are taken, so nothing was run. Send less at once.",
        details={"limit": limit, "actual": actual},
    )


def _fields(value: object) -> object:
    if isinstance(value, Message):
        return value.__dict__
    raise TypeError


def _milliseconds(text: str | None, scale: float) -> int | None:
    """A header's positive number times `scale`; None where it is not one (a header of ours that is no number is refused by nobody)."""
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return max(1, int(value * scale)) if 0 < value < math.inf else None


def _trace_id(traceparent: str | None) -> str | None:
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return match[1] if match else None
