"""One request body in, its calls out, each checked for itself; and one answer's bytes.

Law of this file: pure; it knows JSON-RPC's envelope and TARS's bounds, and no method. A bad element spoils nobody else's answer,
and what can be refused is refused before anything is run: bytes, then JSON, then the batch's length, then depth, count and strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any

import orjson
from pydantic import ValidationError

from tars.errors import InternalError, InvalidParams, InvalidRequest, LimitExceeded, ParseError, TarsError
from tars.messages.base import CallMeta, Message, fields_of
from tars.rpc.options import EnvelopeLimits
from tars.rpc.validation import faults

RequestId = str | int | float | None

NO_META = CallMeta()
"""Shared by every call that brings none."""

_MAX_EXACT_ID = 2**53
"""A number beyond it is not the same in every JSON reader (and orjson reads integers over 64 bits as floats), so the echo could differ."""
_MAX_ID_LENGTH = 1024
"""An id is a correlation key; answers must not be an amplifier."""
_MEMBERS = {"jsonrpc", "method", "params", "id"}
_NAME_SHOWN = 64
"""How much of an unknown name is said back."""


@dataclass(slots=True)
class Call:
    """One valid request or notification. `params` has lost its `_meta`."""

    method: str
    params: dict[str, Any] | list[Any] | None
    id: RequestId
    notification: bool
    meta: CallMeta = NO_META


@dataclass(slots=True)
class BadElement:
    """One element that is no valid request: answered with `error`, under its id where that could be read; a notification never is."""

    id: RequestId
    error: TarsError
    notification: bool = False


Element = Call | BadElement


def decode(body: bytes, limits: EnvelopeLimits) -> Element | list[Element]:
    """The call, or the batch's calls in order. Raises `ParseError`, `InvalidRequest` (an empty batch) or `LimitExceeded`."""
    value = _load(body, limits)
    if type(value) is list:
        if not value:
            raise InvalidRequest("Invalid Request: the batch is empty, so there is nothing to answer. Put calls in it.")
        if len(value) > limits.max_batch:
            raise LimitExceeded(
                f"The batch has {len(value)} elements and at most {limits.max_batch} are taken; nothing was run. Send it in "
                "several batches.",
                details={"limit": limits.max_batch, "actual": len(value), "bound": "batch_length"},
            )
    _check_bounds(body, value, limits)
    if type(value) is list:
        return [_element(one) for one in value]
    return _element(value)


def load_json(body: bytes, limits: EnvelopeLimits) -> Any:
    """Any JSON within the bounds, for a face whose bodies are no calls. Raises `ParseError` or `LimitExceeded`."""
    value = _load(body, limits)
    _check_bounds(body, value, limits)
    return value


def encode_result(request_id: RequestId, result: object) -> bytes:
    """The answer's bytes. Raises `InternalError` where JSON cannot say the result (lone surrogates, 65-bit integers, NaN)."""
    try:
        said = result.wire() if isinstance(result, Message) else result
        answer = orjson.dumps({"jsonrpc": "2.0", "result": said, "id": request_id}, default=fields_of)
        # orjson writes null for NaN and infinity: a vector with a hole in it would look like an answer. No null, no such hole.
        if b"null" in answer and not _finite(result):
            raise ValueError
        return answer
    except (TypeError, ValueError, RecursionError):
        raise InternalError(
            "The answer cannot be written as JSON, which is a fault of this node and not of the call. Report it with the trace id."
        ) from None


def encode_error(request_id: RequestId, error: dict[str, Any]) -> bytes:
    """The error answer's bytes, of `TarsError.to_json`'s object; details that JSON cannot say are left out."""
    answer = {"jsonrpc": "2.0", "error": error, "id": request_id}
    try:
        return orjson.dumps(answer, default=fields_of)
    except (TypeError, ValueError, RecursionError):
        kept = ("kind", "retryable", "retry_after_ms", "node", "trace_id")
        data = {key: error["data"][key] for key in kept if key in error["data"]}
        message = str(error["message"]).encode("utf-8", "replace").decode()
        answer["error"] = {"code": error["code"], "message": message, "data": data}
        return orjson.dumps(answer)


def encode_notification(method: str, request_id: RequestId, delta: Message) -> bytes:
    """A notification's bytes: the delta's fields and the call's `id` as its params. Raises `InternalError` as `encode_result` does."""
    try:
        return orjson.dumps(
            {"jsonrpc": "2.0", "method": method, "params": {"id": request_id, **delta.wire()}}, default=fields_of
        )
    except (TypeError, ValueError, RecursionError):
        raise InternalError(
            "A piece of the answer cannot be written as JSON, which is a fault of this node. Report it with the trace id."
        ) from None


def too_large(limit: int, actual: int | None) -> LimitExceeded:
    """The refusal of a body over the bound; `actual` None where reading stopped at the bound."""
    return LimitExceeded(
        f"The body is larger than the {limit:,} bytes that are taken, so nothing was run. Send less at once, or raise "
        "limits.max_body_bytes in the node's configuration.",
        details={"limit": limit, "actual": actual, "bound": "body_bytes"},
    )


def _finite(value: object) -> bool:
    """True where no float in it is NaN or infinite. A vector is summed first (C speed): any NaN or infinity shows in the sum."""
    if type(value) is list or type(value) is tuple:
        if value and type(value[0]) is float:
            try:
                return isfinite(fsum(value))
            except (TypeError, OverflowError, ValueError):
                pass  # mixed types, or opposite infinities: look at each
        return all(map(_finite, value))
    if type(value) is float:
        return isfinite(value)
    if isinstance(value, Message):
        value = value.__dict__
    return all(map(_finite, value.values())) if type(value) is dict else True


def _too_deep(limit: int) -> LimitExceeded:
    return LimitExceeded(
        f"The JSON nests deeper than the {limit} levels that are taken; nothing was run. Send it flatter.",
        details={"limit": limit, "actual": None, "bound": "depth"},
    )


def _load(body: bytes, limits: EnvelopeLimits) -> Any:
    size = len(body)
    if size > limits.max_body_bytes:
        raise too_large(limits.max_body_bytes, size)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as fault:
        if "depth limit" in str(fault):
            raise _too_deep(limits.max_depth) from None
        raise ParseError(
            "Parse error: the body is not JSON in UTF-8 (RFC 8259; no NaN, no lone surrogates, no byte order mark), so nothing "
            "was run. Correct it and send it again.",
            details={"line": fault.lineno, "column": fault.colno},
        ) from None
    return value


def _check_bounds(body: bytes, value: object, limits: EnvelopeLimits) -> None:
    """Walks level by level, containers only; strings only where the body is long enough to hold a too long one."""
    size = len(body)
    opened = body.count(b"{") + body.count(b"[") if size > 2 * limits.max_depth else 0
    # Every container costs two bytes and every string two quotes, so a small body cannot break either bound: no walk for it.
    if size <= 2 * limits.max_depth and size <= limits.max_string_bytes:
        return
    check_strings = size > limits.max_string_bytes
    # A value is the first of its container, or has a comma before it (those in strings only make the guess higher).
    check_count = size > limits.max_values and opened + body.count(b",") > limits.max_values
    if not check_strings and not check_count and opened <= limits.max_depth:
        return
    level: list[Any] = [value]
    depth = values = 0
    while level:
        depth += 1
        if depth > limits.max_depth and any(type(one) in (dict, list) for one in level):
            raise _too_deep(limits.max_depth)
        below: list[Any] = []
        for one in level:
            kind = type(one)
            if kind is dict:
                children = [*one.keys(), *one.values()] if check_strings else one.values()
            elif kind is list:
                children = one
            else:
                continue
            values += len(one)
            if values > limits.max_values:
                raise LimitExceeded(
                    f"The JSON holds more than the {limits.max_values:,} values that are taken, so nothing was run. Send it in several "
                    "calls.",
                    details={"limit": limits.max_values, "actual": None, "bound": "values"},
                )
            if check_strings:
                for child in children:
                    if type(child) is str:
                        _check_string(child, limits.max_string_bytes)
            below.extend([child for child in children if type(child) is dict or type(child) is list])
        level = below


def _check_string(text: str, limit: int) -> None:
    # UTF-8 needs between one and four bytes a character: only the middle ground has to be counted.
    if len(text) * 4 <= limit:
        return
    actual = len(text) if len(text) > limit else len(text.encode())
    if actual > limit:
        raise LimitExceeded(
            f"A string is longer than the {limit:,} bytes that are taken, so nothing was run. Shorten it, or raise "
            "limits.max_string_bytes in the node's configuration.",
            details={"limit": limit, "actual": actual, "bound": "string_bytes"},
        )


def _element(value: Any) -> Element:
    if type(value) is not dict:
        return BadElement(
            None, InvalidRequest("Invalid Request: a call is an object with jsonrpc, method, params and id.")
        )
    notification = "id" not in value
    request_id = value.get("id")
    if not (request_id is None or type(request_id) is int or _acceptable_id(request_id)):
        return BadElement(
            None,
            InvalidRequest(
                f"Invalid Request: id must be null, a string of at most {_MAX_ID_LENGTH} characters, or a number within 2**53."
            ),
        )
    method = value.get("method")
    if value.get("jsonrpc") != "2.0":
        problem = 'jsonrpc must be exactly "2.0"'
    elif type(method) is not str:
        problem = "method must be a string"
    elif len(value) > 2 and (unknown := value.keys() - _MEMBERS):
        names = ", ".join(repr(name[:_NAME_SHOWN]) for name in sorted(unknown)[:3])
        problem = f"unknown member {names}; a call has jsonrpc, method, params and id (parameters stand inside params)"
    else:
        params = value.get("params")
        if params is None and "params" not in value:
            return Call(method, None, request_id, notification)
        if type(params) is list:
            return Call(method, params, request_id, notification)
        if type(params) is dict:
            if "_meta" not in params:
                return Call(method, params, request_id, notification)
            return _with_meta(method, params, request_id, notification)
        problem = "params must be an object (or an array)"
    return BadElement(request_id, InvalidRequest(f"Invalid Request: {problem}. Nothing was run."))


def _acceptable_id(request_id: object) -> bool:
    if type(request_id) is str:
        return len(request_id) <= _MAX_ID_LENGTH
    # A fraction SHOULD NOT be used, says the specification: so it may be.
    return type(request_id) is float and -_MAX_EXACT_ID <= request_id <= _MAX_EXACT_ID


def _with_meta(method: str, params: dict[str, Any], request_id: RequestId, notification: bool) -> Element:
    raw = params.pop("_meta")
    try:
        return Call(method, params, request_id, notification, CallMeta.model_validate(raw))
    except ValidationError as fault:
        listed = faults(CallMeta, raw, fault)
    error = InvalidParams(
        f"Invalid params: _meta{'.' if listed[0]['at'] else ''}{listed[0]['at']}: {listed[0]['problem']}. Nothing was run; it may "
        "hold timeout_ms, idempotency_key, traceparent, hops and priority.",
        details={"errors": [{**one, "at": f"_meta.{one['at']}".rstrip(".")} for one in listed[:10]]},
    )
    return BadElement(request_id, error, notification)
