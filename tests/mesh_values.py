"""Hypothesis strategies for what the nodes of a mesh tell each other: any value, record or envelope that the types allow."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache

from hypothesis import strategies as st

from tars.core.mesh_messages import Envelope, Record, Stamp
from tars.core.replicated_map import KINDS
from tars.core.types import Bytes

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
BOUNDS = {
    "replicas": 64,
    "context": 1_048_576,
    "slots": 256,
    "kv_tokens": 268_435_456,
    "gpu_layers": 100_000,
    "root": 2**64 - 1,
    "gone": 2**64 - 1,
}
SIGNED = ("priority", "temperature_celsius", "quality", "scale")


@cache
def of_type(kind: typing.Any, name: str = "") -> st.SearchStrategy[typing.Any]:
    """Any value of an annotation of ours. `name` is the field's, whose bounds may be narrower."""
    if isinstance(kind, typing.NewType):
        return NAMES
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Record:
        return RECORDS
    if origin in (typing.Union, types.UnionType):
        return st.one_of([of_type(each, name) for each in arguments])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(of_type(arguments[0], name), max_size=2).map(tuple)
        return st.tuples(*(of_type(each, name) for each in arguments))
    if kind is types.NoneType:
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is str:
        return TEXTS
    if kind is float:
        return st.floats(-1e9 if name in SIGNED else 0, 1e9)
    if issubclass(kind, StrEnum):
        return st.sampled_from(list(kind))
    if issubclass(kind, int):
        least = -1000 if name in SIGNED else 0
        return st.integers(least, BOUNDS.get(name, 2**60)).map(kind if kind is Bytes else int)
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    # A default is drawn often, since it is what most records hold.
    built: dict[str, st.SearchStrategy[typing.Any]] = {}
    for field in fields(kind):
        drawn = of_type(hints[field.name], field.name)
        built[field.name] = drawn if field.default is MISSING else st.one_of(st.just(field.default), drawn)
    return st.builds(kind, **built)


STAMPS: st.SearchStrategy[Stamp] = of_type(Stamp)


def _records(prefix: str) -> st.SearchStrategy[Record]:
    values = st.one_of(of_type(KINDS[prefix]), st.none())
    return st.builds(Record, NAMES.map(lambda name: prefix + name), STAMPS, values)


RECORDS: st.SearchStrategy[Record] = st.one_of([_records(prefix) for prefix in KINDS])
"""Of any kind, tombstones too. Whether a key fits its value is the map's question, not the codec's."""

ENVELOPES: st.SearchStrategy[Envelope] = of_type(Envelope)
