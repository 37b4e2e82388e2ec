"""The base of every message, and what goes with a call rather than in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tars.core.types import Deadline


class Message(BaseModel):
    """Frozen, strict (no "5" for 5) and closed: an unknown field is an error at the edge."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def wire(self) -> dict[str, Any]:
        """The fields that are written as JSON, as they are (no copy). What travels often leaves out those that say nothing."""
        return self.__dict__


MAX_NAME_LENGTH = 255
"""Of a model, a variant or a device, in characters: no file name is longer. Errors and the status page repeat names."""


MAX_TIMEOUT_MS = 86_400_000
"""A day: a call that may take longer is a mistake in its units."""


class NoParams(Message):
    """A method that takes nothing."""


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


@dataclass(frozen=True, slots=True)
class CallContext:
    """One call's surroundings: made by a face (rpc, web), carried to the router. `caller`: the key's name, `local`, or `mesh`."""

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
