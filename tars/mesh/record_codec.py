"""Values, records and envelopes as JSON and back; nothing of it is believed before it was checked.

Law of this file: what comes in is bounded (`MOST_...`), of the right types, and complete, or one `InvalidParams` says where it is not;
whatever the bytes are, nothing else is raised. Fields that hold their default are not written, so a default is part of the contract.
Other versions: a record under an unknown prefix, an unknown body and unknown fields are passed over. So a newer version may add those; what
an older one would refuse (another type, a new name in an enumeration that it plans by) needs a prefix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import orjson
from pydantic import TypeAdapter, ValidationError

from tars.core.mesh_messages import (
    Ack,
    Body,
    Compare,
    Envelope,
    Nack,
    News,
    Ping,
    PingRequest,
    Record,
    Stamp,
    Update,
    Want,
)
from tars.core.records import Value, Wish
from tars.core.replicated_map import KINDS, MOST_KEY_LENGTH, prefix_of
from tars.core.types import NodeId
from tars.errors import InvalidParams

MOST_TEXT = 8_192
"""Characters of a string: reasons and errors are sentences."""
MOST_ITEMS = 8_192
"""Of a list. A comparison has 256 hashes, an advert some dozens of replicas and files."""
MOST_FIELDS = 256
"""Of an object."""
MOST_NUMBER = 2**60
"""An exbibyte; also above every clock and hash."""
MOST_DEPTH = 16
"""An envelope with an advert with a model's shape is 10 deep."""
SIGNED = frozenset({"priority", "temperature_celsius", "gpu_layers", "scale", "quality"})
"""Fields that may be below zero. All other numbers are counts, bytes, times and shares."""
MOST_WISHED: Mapping[str, int] = {
    "replicas": 64,
    "context": 1_048_576,
    "slots": 256,
    "kv_tokens": 268_435_456,
    "gpu_layers": 100_000,
}
"""What `models.deploy` takes at most: a peer that asks for a billion replicas must not keep every planner busy for ever."""

BODIES: Mapping[str, type[Body]] = {
    "ping": Ping,
    "ping_request": PingRequest,
    "ack": Ack,
    "nack": Nack,
    "compare": Compare,
    "want": Want,
    "news": News,
}
_HASHES = ("root", "gone")
"""Of an envelope: numbers of 64 bits."""
_BODY_NAMES = {kind: name for name, kind in BODIES.items()}

_VALUES: Mapping[str, TypeAdapter[Any]] = {prefix: TypeAdapter(kind) for prefix, kind in KINDS.items()}
_BODIES: Mapping[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in BODIES.items()}
_STAMP = TypeAdapter(Stamp)
_UPDATES = TypeAdapter(tuple[Update, ...])

_T = TypeVar("_T")


# --- out ----------------------------------------------------------------------------------------------------------------


def encode_stamp(stamp: Stamp) -> list[Any]:
    """`[wall_ms, counter, node]`."""
    return [stamp.wall_ms, stamp.counter, stamp.node]


def encode_record(record: Record) -> dict[str, Any]:
    """`{key, stamp, value}`; what the value is stands in the key. `value` null is a tombstone."""
    return {"key": record.key, "stamp": encode_stamp(record.stamp), "value": _encode_value(record)}


def encode_envelope(envelope: Envelope) -> dict[str, Any]:
    """The whole packet as what `json` and `orjson` write."""
    name = _BODY_NAMES[type(envelope.body)]
    return {
        "sender": envelope.sender,
        "incarnation": envelope.incarnation,
        "root": envelope.root,
        "gone": envelope.gone,
        "body": {"is": name, **_BODIES[name].dump_python(envelope.body, mode="json", exclude_defaults=True)},
        "updates": _UPDATES.dump_python(envelope.updates, mode="json", exclude_defaults=True),
        "records": [encode_record(record) for record in envelope.records],
    }


def checked(record: Record) -> Record:
    """The record, if every node would take it; else `InvalidParams`. Asked before a write of this node counts."""
    decode_record(encode_record(record))
    return record


def _encode_value(record: Record) -> Any:
    if record.value is None:
        return None
    return _VALUES[prefix_of(record.key)].dump_python(record.value, mode="json", exclude_defaults=True)


# --- in -----------------------------------------------------------------------------------------------------------------


def decode_record(data: object, at: str = "") -> Record | None:
    """One record; None where its key is of a kind that this version does not know. Raises `InvalidParams` with the place."""
    _bounded(data, at)
    return _record(data, at)


def decode_stamp(data: object, at: str = "") -> Stamp:
    """A stamp from `encode_stamp`. Raises `InvalidParams`."""
    _bounded(data, at)
    return _stamp(data, at)


def decode_envelope(data: object, problems: list[InvalidParams] | None = None) -> Envelope:
    """A packet. Raises `InvalidParams` with the place.

    With `problems` given, bad records are left out and noted there instead, so that one record that this version cannot read does not
    cut its sender off; what says who lives is still strict.
    """
    fields = _object(data, "")
    for name, part in fields.items():
        if name not in ("records", *_HASHES):
            _bounded(part, name)
    sender = _text(fields, "sender", "", MOST_KEY_LENGTH)
    updates = fields.get("updates", [])
    if not isinstance(fields.get("records", []), list) or len(fields.get("records", [])) > MOST_ITEMS:
        raise _invalid("records", f"should be a list of at most {MOST_ITEMS} items")
    records = []
    for index, each in enumerate(fields.get("records", [])):
        try:
            record = decode_record(each, f"records[{index}]")
        except InvalidParams as bad:
            if problems is None:
                raise
            problems.append(bad)
            continue
        if record is not None:
            records.append(record)
    return Envelope(
        sender=NodeId(sender),
        incarnation=_whole(fields, "incarnation"),
        body=_body(fields.get("body")),
        root=_hash(fields, "root"),
        gone=_hash(fields, "gone"),
        updates=_validated(_UPDATES, updates, "updates"),
        records=tuple(records),
    )


def _body(data: object) -> Body:
    fields = _object(data, "body")
    name = _text(fields, "is", "body", 64)
    if name not in _BODIES:
        return News()  # a newer version's; what rides along still counts
    return cast(Body, _validated(_BODIES[name], fields, "body"))


def _record(data: object, at: str) -> Record | None:
    fields = _object(data, at)
    key = _text(fields, "key", at, MOST_KEY_LENGTH)
    if "stamp" not in fields or "value" not in fields:
        raise _invalid(at, "a record needs key, stamp and value")
    stamp = _stamp(fields["stamp"], f"{at}.stamp")
    adapter = _VALUES.get(prefix_of(key))
    if adapter is None:
        return None
    if fields["value"] is None:
        return Record(key, stamp, None)
    value: Value = _validated(adapter, fields["value"], f"{at}.value")
    if isinstance(value, Wish):
        _wishable(value, f"{at}.value.deployment")
    return Record(key, stamp, value)


def _stamp(data: object, at: str) -> Stamp:
    match data:
        case [int(wall_ms), int(counter), str(node)] if not isinstance(wall_ms, bool) and not isinstance(counter, bool):
            return Stamp(wall_ms, counter, NodeId(node))
    raise _invalid(at, "a stamp is [milliseconds, counter, node]")


def _wishable(wish: Wish, at: str) -> None:
    for name, most in MOST_WISHED.items():
        wanted = getattr(wish.deployment, name)
        if wanted is not None and not 0 <= wanted <= most:
            raise _invalid(f"{at}.{name}", f"should be 0 to {most}")


# --- checks ---------------------------------------------------------------------------------------------------------------


def _validated(adapter: TypeAdapter[_T], data: object, at: str) -> _T:
    """Strictly, as JSON: there a list may be a tuple and a string an enumeration's, and nothing else changes its type."""
    try:
        return adapter.validate_json(orjson.dumps(data), strict=True)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        problem = "required, but not given" if first["type"] == "missing" else first["msg"].removeprefix("Input ")
        raise _invalid(at + place, problem) from None
    except orjson.JSONEncodeError:
        raise _invalid(at, "no JSON text can say this") from None


def _bounded(data: object, at: str) -> None:
    try:
        _check(data, "", 0)
    except _OutOfBounds as fault:
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:64]}" for step in reversed(fault.path))
        raise _invalid(at + place, fault.problem) from None


class _OutOfBounds(Exception):
    """The way to the fault is added step by step on the way back: what is sound, nearly everything, costs no place."""

    def __init__(self, problem: str):
        super().__init__(problem)
        self.problem = problem
        self.path: list[int | str] = []


def _check(data: object, name: str, depth: int) -> None:
    if isinstance(data, str):
        if len(data) > MOST_TEXT:
            raise _OutOfBounds(f"a text of {len(data)} characters; at most {MOST_TEXT}")
        if not data.isascii() and any("\ud800" <= character <= "\udfff" for character in data):
            raise _OutOfBounds("half of a surrogate pair is no text")
    elif data is None or isinstance(data, bool):
        return
    elif isinstance(data, (int, float)):
        if not -MOST_NUMBER <= data <= MOST_NUMBER:  # NaN is neither
            raise _OutOfBounds("the number is out of bounds")
        if data < 0 and name not in SIGNED:
            raise _OutOfBounds("should not be below 0")
    elif depth >= MOST_DEPTH:
        raise _OutOfBounds(f"nested deeper than {MOST_DEPTH}")
    elif isinstance(data, list):
        if len(data) > MOST_ITEMS:
            raise _OutOfBounds(f"a list of {len(data)} items; at most {MOST_ITEMS}")
        step: int | str
        for step, each in enumerate(data):
            try:
                _check(each, name, depth + 1)
            except _OutOfBounds as fault:
                fault.path.append(step)
                raise
    elif isinstance(data, dict):
        if len(data) > MOST_FIELDS:
            raise _OutOfBounds(f"an object of {len(data)} fields; at most {MOST_FIELDS}")
        for step, each in data.items():
            if not isinstance(step, str):
                raise _OutOfBounds("a field's name should be a text")
            _check(step, "", 0)
            try:
                _check(each, step, depth + 1)
            except _OutOfBounds as fault:
                fault.path.append(step)
                raise
    else:
        raise _OutOfBounds("is no JSON value")


def _object(data: object, at: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _invalid(at, "should be an object")
    return data


def _text(fields: Mapping[str, Any], name: str, at: str, most: int) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise _invalid(f"{at}.{name}", f"should be a text of 1 to {most} characters")
    return value


def _whole(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(name, "should be a whole number")
    return value


def _hash(fields: Mapping[str, Any], name: str) -> int:
    value = _whole(fields, name)
    if not 0 <= value < 2**64:
        raise _invalid(name, "a hash has 64 bits")
    return value


def _invalid(at: str, problem: str) -> InvalidParams:
    at = at.removeprefix(".")
    return InvalidParams(
        f"Invalid params: {at + ': ' if at else ''}{problem}. Nothing of it was taken; it was written by another version of TARS, or is no "
        "record of a mesh at all.",
        details={"errors": [{"at": at, "problem": problem}]},
    )
