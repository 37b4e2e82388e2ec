"""The base of every message, and what goes with a call rather than in it."""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from tars.core.types import Deadline


class Message(BaseModel):
    """Frozen, strict (no "5" for 5) and closed: an unknown field is an error at the edge."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def wire(self) -> dict[str, Any]:
        """The fields that are written as JSON, as they are (no copy). What travels often leaves out those that say nothing."""
        return self.__dict__


def fields_of(value: object) -> object:
    """For orjson's `default`: what a message writes, without `model_dump`'s copy (there are no aliases). Raises `TypeError` for others."""
    if isinstance(value, Message):
        return value.wire()
    raise TypeError


MAX_NAME_LENGTH = 255
"""Of a model, a variant or a device, in characters: no file name is longer. Errors and the status page repeat names."""


MAX_TIMEOUT_MS = 86_400_000
"""A day: a call that may take longer is a mistake in its units."""


MOST_CALLER_LENGTH = 200
"""Of a caller's name, in characters; those of keys are shorter."""


class NoParams(Message):
    """A method that takes nothing."""


Priority = Literal["interactive", "batch"]
"""Who waits: a person, or nobody."""


def _token_text(tokens: list[int]) -> str:
    return base64.b64encode(_little_endian(array("I", tokens)).tobytes()).decode()


def _tokens_of(value: object) -> object:
    """Of base64 text; anything else is for pydantic to check."""
    if not isinstance(value, str):
        return value
    try:
        given = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("token ids are base64 of 32-bit little-endian numbers") from None
    if len(given) % TOKEN_BYTES:
        raise ValueError("token ids are base64 of 32-bit little-endian numbers, and this is no whole number of them")
    return _little_endian(array("I", given)).tolist()


def _little_endian(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


TOKEN_BYTES = 4

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**32)]],
    BeforeValidator(_tokens_of),
    PlainSerializer(_token_text, when_used="json"),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]
"""Token ids, in JSON as base64 of little-endian uint32: an answer of 128 Ki tokens would be more values than a body may hold."""


class SavedState(Message):
    """The state of a running answer, in a file that node `node` keeps for whoever goes on with it."""

    node: str = Field(max_length=64)
    id: str = Field(max_length=64, description="Random: who knows it may have the file, once.")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    layout: str = Field(
        "", max_length=200, description="How the engine lays it out: only a replica of the same one can take it."
    )


class ResumeMeta(Message):
    """Go on with answers that were broken off elsewhere: how one node tells another. The call's own params come with it unchanged."""

    answers: list[TokenIds] = Field(
        min_length=1, max_length=16, description="All tokens of each of the `n` answers so far."
    )
    handed_out: list[int] | None = Field(
        None,
        max_length=16,
        description="How many of each answer's tokens the caller has; None is all. What is behind them was held back when it broke.",
    )
    ended: list[int] = Field(
        default_factory=list, max_length=16, description="Answers (by index) that were whole: nothing is added to them."
    )
    seed: int = Field(ge=0, le=2**32 - 1)
    file_sha256: str | None = Field(
        None,
        max_length=128,
        description="What the tokens were computed from, as adverts say it: only such a replica goes on with them.",
    )
    state: SavedState | None = Field(None, description="Saves computing the tokens again, where it can be had.")


class CallMeta(Message):
    """`params._meta`: popped by the dispatcher before the params are checked."""

    timeout_ms: int | None = Field(
        None, ge=1, le=MAX_TIMEOUT_MS, description="Time budget left, in ms; every hop takes its share off."
    )
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=200, description="A repeated key returns the first call's answer."
    )
    traceparent: str | None = Field(None, max_length=64, description="W3C trace context.")
    hops: int = Field(0, ge=0, le=8, description="How often the call was forwarded; never forwarded again after 1.")
    priority: Priority | None = Field(None, description="Default: interactive, which goes before batch.")
    caller: str | None = Field(None, max_length=MOST_CALLER_LENGTH, description="Only between nodes: whose call it is.")
    resume: ResumeMeta | None = Field(None, description="Only between nodes: the answers are begun already.")
    file_sha256: str | None = Field(
        None,
        max_length=128,
        description="Only between nodes: what the answer is to be computed from, as adverts say it.",
    )


@dataclass(frozen=True, slots=True)
class CallContext:
    """One call's surroundings: made by a face (rpc, web), carried to the router. `caller`: the key's name, `local`, or `mesh`; of a call
    that a peer forwarded, the caller there.
    """

    deadline: Deadline
    trace_id: str
    method: str = ""
    idempotency_key: str | None = None
    hops: int = 0
    caller: str = "local"
    face: str = field(default="rpc")
    """`rpc`, `openai`, `rest`: for logs and the status page."""
    peer: str | None = None
    """The NodeId of the peer that forwarded the call, or asks for itself; its certificate proved it. None for clients."""
    source: str = ""
    """The address that the call came from, where it matters who it is that nobody knows yet: `mesh.join`."""
    priority: Priority | None = None
    """None is interactive."""
    resume: ResumeMeta | None = None
    """Of a call that a peer forwarded: where its answers are."""
    file_sha256: str | None = None
    """Of a call that a peer forwarded: only a replica of this file may answer. A PC with two cards may have the model in two files, and the
    peer, which counts on the one that it chose, goes on elsewhere where an answer breaks."""
    streamed: bool = False
    """Its caller sees the deltas."""
    administrator: bool = False
    """Or a peer: it may hear of every caller's calls."""
    first_by: Deadline | None = None
    """When its caller goes away if nothing has come by then; None: it waits for as long as the deadline says."""
