"""Raw params in, a message out; or one `InvalidParams` that says which parameter is wrong and how.

Law of this file: pure. What it says of a fault is made from the parameter's place and pydantic's own wording for JSON types; never a Python
signature, an exception's text or the value that was sent (it may be a secret).
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from tars.errors import InvalidParams
from tars.messages.base import Message, NoParams
from tars.rpc.method_table import MethodSpec

_MAX_ERRORS_LISTED = 10
"""A caller mends a call by its first faults; ten thousand bad messages need not come back as ten thousand lines."""
_MAX_ERRORS_READ = 100
"""Of those that pydantic found: what comes after is more of the same, and comparing them all would cost their square."""
_MAX_NAME_SHOWN = 64
"""No parameter of ours is longer; a longer unknown name is shown cut."""

NO_PARAMS = NoParams()
"""Shared: a method that takes nothing costs no validation."""


def validated(spec: MethodSpec, params: dict[str, Any] | list[Any] | None) -> Message:
    """`params` as the method's message. Raises `InvalidParams`, with each fault and its place in `details["errors"]`."""
    if not params and spec.params is NoParams:
        return NO_PARAMS
    if params is None:
        params = {}
    elif isinstance(params, list):
        params = _by_name(spec, params)
    try:
        return spec.params.model_validate(params)
    except ValidationError as fault:
        listed = faults(spec.params, params, fault)
    more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
    place = f"{listed[0]['at']}: " if listed[0]["at"] else ""
    raise InvalidParams(
        f"Invalid params: {spec.name}: {place}{listed[0]['problem']}{more}. Nothing was run; correct the params and send "
        "the call again (rpc.discover lists them).",
        details={"errors": listed[:_MAX_ERRORS_LISTED]},
    )


def faults(model: type[Message], value: object, fault: ValidationError) -> list[dict[str, str]]:
    """Each fault as `{at, problem}`: `at` is the place in what was sent (`messages[0].role`), `problem` a sentence without a full stop."""
    listed: list[dict[str, str]] = []
    for error in fault.errors(include_url=False, include_input=False, include_context=False)[:_MAX_ERRORS_READ]:
        kind, location, problem = error["type"], error["loc"], error["msg"]
        if kind == "extra_forbidden":
            problem = "unknown parameter" + _nearest(model, location)
        elif kind == "missing":
            problem = "required, but not given"
        else:
            problem = problem.removeprefix("Value error, ").removeprefix("Input ")
        place = _place(location, value, keep_last=kind in ("missing", "extra_forbidden"))
        if {"at": place, "problem": problem} not in listed[-_MAX_ERRORS_LISTED:]:
            listed.append({"at": place, "problem": problem})
    # Where a value may be of two shapes, pydantic reports both: the one that was meant is the one with a fault further inside.
    places = [one["at"] for one in listed]
    return [one for one in listed if not any(place.startswith((f"{one['at']}[", f"{one['at']}.")) for place in places)]


def _by_name(spec: MethodSpec, params: Sequence[Any]) -> dict[str, Any]:
    if not spec.positional:
        raise InvalidParams(
            f"Invalid params: {spec.name} takes named params only, and got them by position. Send an object instead of an "
            'array: {"params": {"name": value}}.'
        )
    names, rest = spec.positional, None
    if names[-1].startswith("*"):
        names, rest = names[:-1], names[-1][1:]
    if len(params) > len(names) and rest is None:
        raise InvalidParams(
            f"Invalid params: {spec.name} takes {len(names)} params by position, and got {len(params)}. Leave the extra ones out."
        )
    named = dict(zip(names, params, strict=False))
    if rest is not None:
        named[rest] = list(params[len(names) :])
    return named


def _place(location: tuple[int | str, ...], value: object, *, keep_last: bool) -> str:
    """The place as a caller writes it. Pydantic also names a union's branches (`list[str]`): what the value has not is left out."""
    shown = ""
    for position, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            shown += f"[{part}]"
            value = value[part]
        elif isinstance(part, str) and isinstance(value, dict) and part in value:
            shown += f".{_cut(part)}"
            value = value[part]
        elif keep_last and position == len(location) - 1:
            shown += f".{_cut(str(part))}"
    return shown.removeprefix(".")


def _nearest(model: type[Message], location: tuple[int | str, ...]) -> str:
    if len(location) != 1:
        return ""
    close = get_close_matches(_cut(str(location[0])), model.model_fields, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_NAME_SHOWN else name[:_MAX_NAME_SHOWN] + "..."
