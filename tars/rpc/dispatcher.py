"""From a checked call to its answer: the one file that knows jsonrpcserver.

Law of this file: every call gets exactly one answer (a notification none), whatever its method does, and nothing of an exception
but its trace id leaves the process. jsonrpcserver's `call` runs each element; its own decoding, schema check and `gather` (a task
per element, even for a lone one) are not used: they cost more than the call and refuse a whole batch for one bad element.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from jsonrpcserver.async_dispatcher import call as run_element
from jsonrpcserver.request import Request
from jsonrpcserver.result import Error, Success

from tars.errors import Cancelled, Forbidden, InternalError, InvalidParams, MethodNotFound, NotAMember, TarsError
from tars.messages.base import CallContext, CallMeta, Message, Priority
from tars.rpc.admission import Admission, internal_error, trace_id_of
from tars.rpc.envelope import BadElement, Call, Element, encode_error, encode_result
from tars.rpc.method_table import METHODS, MethodSpec, Role
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
    role: Role = Role.CLIENT
    peer: str | None = None
    """The NodeId of the peer that sent it."""
    source: str = ""
    """The address that it came from, for strangers."""
    priority: Priority | None = None


LOCAL = Arrival(role=Role.ADMINISTRATOR)
"""On loopback, where no key exists at all."""


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
        admission: Admission | None = None,
    ) -> None:
        if handlers.keys() != methods.keys():
            raise ValueError(f"handlers and method table differ: {sorted(handlers.keys() ^ methods.keys())}")
        self._options = options
        self._log = log
        self.admission = admission or Admission(options)
        """The node's places; the other faces share them."""
        self._specs = methods
        self._methods = {name: self._bound(methods[name], handler) for name, handler in handlers.items()}

    def refusal(self, error: TarsError) -> bytes:
        """The answer to a body of which nothing could be run: its id is null."""
        return encode_error(None, error.to_json(node=self._log.node_id, trace_id=self.admission.new_trace_id()))

    def call_id(self, element: Element, arrival: Arrival) -> str:
        """A call's id, its trace id: the one that its caller gave, else a new one."""
        given = (None if isinstance(element, BadElement) else element.meta.traceparent) or arrival.traceparent
        return (trace_id_of(given) if given is not None else None) or self.admission.new_trace_id()

    async def answer(
        self, element: Element, arrival: Arrival = LOCAL, emit: Emit | None = None, call_id: str | None = None
    ) -> bytes | None:
        """One element's answer; None for a notification. `emit` gets the deltas of a method that streams, else they are dropped.
        `call_id`: what `call_id` gave, where the caller was told it already.
        """
        trace_id = call_id or self.call_id(element, arrival)
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
        if arrival.role not in spec.roles:
            return None if element.notification else self._error(element.id, _not_for(spec, arrival.role), trace_id)
        if (misused := _misused(element.meta, spec, arrival)) is not None:
            return None if element.notification else self._error(element.id, misused, trace_id)
        running = _Running(element, spec, arrival, emit, trace_id)
        counted = not spec.is_background
        if counted:
            self._log.call_started(name)
        try:
            result = await run_element(Request(name, {}, element.id), running, self._methods[name])
            answer = None if element.notification else self._encoded(running, result)
        except BaseException:
            running.error = Cancelled("The caller went away before the answer was complete; the work was stopped.")
            raise
        finally:
            if counted:
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
                return self._failed(running, internal_error())
            return Success(result)

        return guarded

    async def _within_bounds(self, running: _Running, handler: Waiting | Streaming, params: Message) -> object:
        """Takes a place among the concurrent calls and holds the work to its deadline."""
        meta, arrival = running.call.meta, running.arrival
        given = [ms for ms in (meta.timeout_ms, arrival.timeout_ms) if ms is not None]
        caller = meta.caller or arrival.caller
        async with self.admission.within_bounds(
            min(given, default=None),
            inference=running.spec.is_inference,
            always=running.spec.is_background,
            caller=caller,
        ) as deadline:
            context = CallContext(
                deadline=deadline,
                trace_id=running.trace_id,
                method=running.spec.name,
                idempotency_key=meta.idempotency_key,
                hops=meta.hops,
                caller=caller,
                face=arrival.face,
                peer=arrival.peer,
                source=arrival.source,
                priority=meta.priority or arrival.priority,
                resume=meta.resume,
                file_sha256=meta.file_sha256,
                streamed=running.emit is not None,
                administrator=arrival.role is not Role.CLIENT,
            )
            work = handler(params, context)
            if running.spec.streams:
                return await _consume(running, cast(AsyncIterator[Any], work))
            return await cast(Awaitable[object], work)

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


def _not_for(spec: MethodSpec, role: Role) -> TarsError:
    if role is Role.STRANGER:
        return NotAMember(
            f"{spec.name} needs the certificate of a node of this mesh, and none was shown; nothing was run. This is the port where nodes "
            "talk to each other; clients use the other one, with an API key."
        )
    if Role.ADMINISTRATOR in spec.roles:
        return Forbidden(
            f"{spec.name} is for administrators, so nothing was run. Call it on the node's own PC with `tars` (which reads the operator "
            "key in the state folder), or with an admin key (`tars key new NAME --admin`), or a key of the node's configuration."
        )
    return Forbidden(f"{spec.name} is what nodes ask each other on the mesh's own port, so nothing was run.")


def _misused(meta: CallMeta, spec: MethodSpec, arrival: Arrival) -> TarsError | None:
    """Why this sender may not say this in `_meta`."""
    if meta.resume is None and meta.caller is None and meta.file_sha256 is None:
        return None
    if arrival.peer is None:
        return Forbidden(
            "_meta.resume, _meta.caller and _meta.file_sha256 are what nodes tell each other on the mesh's own port, so nothing was run. "
            "Leave them out."
        )
    if meta.resume is not None and not spec.streams:
        return InvalidParams(
            f"Invalid params: _meta.resume: {spec.name} generates nothing that could go on. Nothing was run."
        )
    return None


async def _consume(running: _Running, stream: AsyncIterator[Any]) -> object:
    """Sends the deltas on, gives the result; closes the stream promptly whatever happens, which is what stops the GPU."""
    spec, emit = running.spec, running.emit
    result: object = None
    async with aclosing(cast(AsyncGenerator[Any, None], stream)):
        async for item in stream:
            if result is not None:
                raise TypeError(f"{spec.name} went on after its result")
            if type(item) is spec.delta or type(item) is spec.progress:
                if emit is not None:
                    await emit(spec, item)
            else:
                result = item
    return result
