"""From a checked call to its answer: the one file that knows jsonrpcserver.

Law of this file: every call gets exactly one answer (a notification none), whatever its method does, and nothing of an exception
but its trace id leaves the process. jsonrpcserver's `call` runs each element; its own decoding, schema check and `gather` (a task
per element, even for a lone one) are not used: they cost more than the call and refuse a whole batch for one bad element.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol, cast

from jsonrpcserver.async_dispatcher import call as run_element
from jsonrpcserver.request import Request
from jsonrpcserver.result import Error, Success

from tars.core.types import Deadline
from tars.errors import Cancelled, DeadlineExceeded, InternalError, MethodNotFound, Overloaded, TarsError
from tars.messages.base import CallContext, Message
from tars.rpc.envelope import BadElement, Call, Element, encode_error, encode_result
from tars.rpc.method_table import METHODS, MethodSpec
from tars.rpc.options import RpcOptions
from tars.rpc.validation import validated

logger = logging.getLogger(__name__)

Immediate = Callable[[Any], object]
"""`handler(params) -> result`: a plain function, cheap, run in place; it has no deadline because it cannot wait."""
Waiting = Callable[[Any, CallContext], Awaitable[object]]
"""`async handler(params, context) -> result`."""
Streaming = Callable[[Any, CallContext], AsyncIterator[Any]]
"""`handler(params, context)` -> deltas, then one result; only for a spec that streams."""
Handler = Immediate | Waiting | Streaming

Emit = Callable[[MethodSpec, Message], Awaitable[None]]
"""Takes one delta of a streamed call to the caller; a `TarsError` out of it ends the call."""

_OPERATORS_RESERVE = 16
"""Calls that are not inference and may still start when `max_concurrent_calls` is reached: a full node must answer its operator."""
_RETRY_AFTER_MS = 1000
"""A place is free again within about one short answer."""
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_NAME_SHOWN = 64
"""How much of an unknown method's name is said back."""


class CallLog(Protocol):
    """The part of `serving.service.NodeService` that counts calls and names the node."""

    @property
    def node_id(self) -> str:
        """For error data."""
        ...

    def call_started(self, method: str) -> None:
        """Once per call of a known method."""
        ...

    def call_ended(self, method: str, error: TarsError | None, trace_id: str) -> None:
        """Once per started call."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a call came: who sent it, and what the transport said beside the body. `_meta` in the params wins."""

    caller: str = "local"
    timeout_ms: int | None = None
    traceparent: str | None = None
    face: str = "rpc"


LOCAL = Arrival()


class _Running:
    """One call under way: what jsonrpcserver hands to the method as its context."""

    __slots__ = ("arrival", "call", "emit", "error", "spec", "trace_id")

    def __init__(self, call: Call, spec: MethodSpec, arrival: Arrival, emit: Emit | None, trace_id: str) -> None:
        self.call = call
        self.spec = spec
        self.arrival = arrival
        self.emit = emit
        self.trace_id = trace_id
        self.error: TarsError | None = None


class Dispatcher:
    """Runs calls. `handlers` gives each method of `methods` its function; a missing or surplus one is refused at once."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        log: CallLog,
        options: RpcOptions,
        methods: Mapping[str, MethodSpec] = METHODS,
    ) -> None:
        if handlers.keys() != methods.keys():
            raise ValueError(f"handlers and method table differ: {sorted(handlers.keys() ^ methods.keys())}")
        self._options = options
        self._log = log
        self._active = 0
        # 64 random bits of this process and a count: as unique as 128 random ones, at a tenth of the price.
        self._trace_prefix = secrets.token_hex(8)
        self._trace_count = itertools.count(1)
        self._specs = methods
        self._methods = {name: self._bound(methods[name], handler) for name, handler in handlers.items()}

    def new_trace_id(self) -> str:
        """32 hexadecimal digits, as W3C trace context wants them."""
        return f"{self._trace_prefix}{next(self._trace_count):016x}"

    def refusal(self, error: TarsError) -> bytes:
        """The answer to a body of which nothing could be run: its id is null."""
        return encode_error(None, error.to_json(node=self._log.node_id, trace_id=self.new_trace_id()))

    async def answer(self, element: Element, arrival: Arrival = LOCAL, emit: Emit | None = None) -> bytes | None:
        """One element's answer; None for a notification. `emit` gets the deltas of a method that streams, else they are dropped."""
        trace_id = _trace_id_of(element, arrival) or self.new_trace_id()
        if isinstance(element, BadElement):
            return None if element.notification else self._error(element.id, element.error, trace_id)
        name = element.method
        spec = self._specs.get(name)
        if spec is None:
            shown = name if len(name) <= _NAME_SHOWN else name[:_NAME_SHOWN] + "..."
            unknown = MethodNotFound(
                f"Method not found: this node has no method '{shown}'. rpc.discover lists the methods that there are."
            )
            return None if element.notification else self._error(element.id, unknown, trace_id)
        running = _Running(element, spec, arrival, emit, trace_id)
        self._log.call_started(name)
        try:
            result = await run_element(Request(name, {}, element.id), running, self._methods[name])
            answer = None if element.notification else self._encoded(running, result)
        except BaseException:
            running.error = Cancelled("The caller went away before the answer was complete; the work was stopped.")
            raise
        finally:
            self._log.call_ended(name, running.error, trace_id)
        return answer

    async def answer_batch(self, elements: Sequence[Element], arrival: Arrival = LOCAL) -> bytes | None:
        """A batch's answers in the order of its calls; None when all were notifications. At most `batch_concurrency` run at once."""
        answers: list[bytes | None] = [None] * len(elements)
        remaining = iter(enumerate(elements))

        async def work() -> None:
            for position, element in remaining:
                answers[position] = await self.answer(element, arrival)

        # Workers instead of a task per element: what is refused or immediate never waits, so often the first one does it all.
        workers = min(self._options.batch_concurrency, len(elements))
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work())
        given = [answer for answer in answers if answer is not None]
        return b"[" + b",".join(given) + b"]" if given else None

    # --- running one method ------------------------------------------------------------------------------------------

    def _bound(self, spec: MethodSpec, handler: Handler) -> Callable[[_Running], Awaitable[Any]]:
        """The coroutine function that jsonrpcserver awaits: `method(context)`; it never raises an `Exception`."""
        waits = spec.streams or inspect.iscoroutinefunction(handler)

        async def guarded(running: _Running) -> Any:
            try:
                params = validated(spec, running.call.params)
                if waits:
                    result = await self._within_bounds(running, cast("Waiting | Streaming", handler), params)
                else:
                    result = cast(Immediate, handler)(params)
                if spec.result is not None and type(result) is not spec.result:
                    raise TypeError(f"{spec.name} gave a {type(result).__name__} instead of a {spec.result.__name__}")
            except TarsError as error:
                return self._failed(running, error)
            except Exception:
                logger.exception("%s failed with a fault of ours (trace %s)", spec.name, running.trace_id)
                return self._failed(running, _internal_error())
            return Success(result)

        return guarded

    async def _within_bounds(self, running: _Running, handler: Waiting | Streaming, params: Message) -> object:
        """Takes a place among the concurrent calls and holds the work to its deadline."""
        most = self._options.max_concurrent_calls + (0 if running.spec.is_inference else _OPERATORS_RESERVE)
        if self._active >= most:
            raise Overloaded(
                f"This node already runs {self._active} calls, its limit, so the call was not started. Send it again a little "
                "later, to another node, or raise limits.max_concurrent_calls.",
                retry_after_ms=_RETRY_AFTER_MS,
                details={"limit": self._options.max_concurrent_calls},
            )
        seconds = self._budget_ms(running) / 1000
        meta = running.call.meta
        context = CallContext(
            Deadline(monotonic() + seconds),
            running.trace_id,
            running.spec.name,
            meta.idempotency_key,
            meta.hops,
            running.arrival.caller,
            running.arrival.face,
        )
        self._active += 1
        try:
            async with asyncio.timeout(seconds) as limit:
                work = handler(params, context)
                if running.spec.streams:
                    return await _consume(running, cast(AsyncIterator[Any], work))
                return await cast(Awaitable[object], work)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"The call did not end within its {seconds:g} s, so the work was stopped. Give it more with _meta.timeout_ms, or "
                "ask for less."
            ) from None
        finally:
            self._active -= 1

    def _budget_ms(self, running: _Running) -> int:
        given = [ms for ms in (running.call.meta.timeout_ms, running.arrival.timeout_ms) if ms is not None]
        return min(given, default=self._options.default_timeout_ms)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _encoded(self, running: _Running, result: Any) -> bytes:
        error = running.error
        if error is None:
            try:
                return encode_result(running.call.id, result._value.result)
            except InternalError as unsayable:
                logger.error("%s gave a result that JSON cannot say (trace %s)", running.spec.name, running.trace_id)
                error = running.error = unsayable
        return self._error(running.call.id, error, running.trace_id)

    def _error(self, request_id: Any, error: TarsError, trace_id: str) -> bytes:
        return encode_error(request_id, error.to_json(node=self._log.node_id, trace_id=trace_id))

    def _failed(self, running: _Running, error: TarsError) -> Any:
        running.error = error
        return Error(error.code, error.message)


async def _consume(running: _Running, stream: AsyncIterator[Any]) -> object:
    """Sends the deltas on, gives the result; closes the stream promptly whatever happens, which is what stops the GPU."""
    spec, emit = running.spec, running.emit
    result: object = None
    async with aclosing(cast(AsyncGenerator[Any, None], stream)):
        async for item in stream:
            if result is not None:
                raise TypeError(f"{spec.name} went on after its result")
            if type(item) is spec.delta:
                if emit is not None:
                    await emit(spec, item)
            else:
                result = item
    return result


def _trace_id_of(element: Element, arrival: Arrival) -> str | None:
    """The trace that the caller is in; a malformed `traceparent` starts a new one, as W3C trace context asks."""
    given = (element.meta.traceparent if isinstance(element, Call) else None) or arrival.traceparent
    if given is None:
        return None
    match = _TRACEPARENT.fullmatch(given)
    if match is None or match[1] == "ff" or not int(match[2], 16) or not int(match[3], 16):
        return None
    return match[2]


def _internal_error() -> InternalError:
    return InternalError(
        "The node met a fault of its own; the call may or may not have had an effect. Report it with the trace id."
    )
