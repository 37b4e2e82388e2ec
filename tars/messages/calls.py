"""Params and result of `calls.explain`: what became of a call.

Law of this file: names, times and outcomes; never what was asked or answered.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tars.messages.base import Message

MOST_CALLS = 20
"""Of one id: callers may put several calls into one trace. The newest ones."""


class ExplainCallParams(Message):
    """`calls.explain`."""

    id: str = Field(
        min_length=1,
        max_length=64,
        description="The call's id: `X-Request-Id` of its answer, `trace_id` of its error, `served_by.call` of its result.",
    )


class AttemptDescription(Message):
    """One replica that was asked."""

    replica: str
    node: str
    node_name: str
    device_name: str
    after_seconds: float = Field(description="Since the call began here.")
    seconds: float | None = Field(description="How long it ran; None: it runs now.")
    why: Literal["first", "retry", "hedge", "continuation"]
    reason: str = Field(description="Why this replica, and how it stood among the others.")
    passed_over: list[str] = Field(default_factory=list, description="How the others stood.")
    outcome: str = Field(description="`answered`, an error's kind, `late`, `hedge_lost`, `cancelled`, `running`.")
    tokens: int = Field(0, description="That it gave.")


class WaitDescription(Message):
    """A stretch of time in which the call waited for something other than a replica's answer."""

    what: str = Field(description="`load`, `backoff`, `replica`, `idempotency_key`.")
    after_seconds: float
    seconds: float | None = Field(description="None: it waits now.")


class CallDescription(Message):
    """One call as the node that had its caller knows it."""

    id: str
    method: str
    model: str
    caller: str
    face: str
    node: str
    node_name: str
    forwarded_by: str | None = Field(
        description="The node that sent it here, where this is only an attempt of that node's call."
    )
    started_at: float = Field(description="Unix time, seconds.")
    seconds: float | None = Field(description="None: it runs now.")
    outcome: str = Field(
        description="`answered`, `repeated`, `cancelled`, `running`, or the kind of the error that the caller got."
    )
    error: str = Field("", description="Its message.")
    repeats: str = Field("", description="The call whose answer it got, under the same idempotency key.")
    attempts: list[AttemptDescription]
    waits: list[WaitDescription]


class ExplainCallResult(Message):
    """`calls.explain`: the calls of that id, the oldest first."""

    calls: list[CallDescription]
    text: str = Field(description="The same for people, some lines.")
