"""The one narrow protocol through which the router reaches whatever answers a call: a local worker, a peer, an upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from tars.messages.base import CallContext, ResumeMeta
from tars.messages.inference import ServedBy
from tars.workers.engine import Event, Work


class Target(Protocol):
    """Something that runs one piece of work."""

    @property
    def served_by(self) -> ServedBy:
        """Who it is, for the answer's metadata. A target that learns more from the answer says it once the answer came."""
        ...

    def run(self, work: Work, call: CallContext, resume: ResumeMeta | None = None) -> AsyncIterator[Event]:
        """Any number of `Delta`, then one finished event, or a `TarsError`. Closing the iterator cancels the work (GPU too).

        `resume`: the answers were begun elsewhere. Only what the caller has not seen comes as deltas; the finished event is the whole, but
        for log probabilities of before.
        """
        ...
