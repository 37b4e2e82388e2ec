"""What every face does with a call before it runs: a place among the calls under way, a deadline, a trace id.

Law of this file: one `Admission` per node, shared by JSON-RPC, OpenAI and REST, so that the bound on calls under way is the node's and not
a face's. It knows no method and no HTTP.

A caller may have all places while nobody else wants one. The last eighth of them is for those who hold less than an equal share, so that
one caller's flood keeps nobody else out; what becomes of the calls inside is `serving.gate`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from tars.core.types import Deadline
from tars.errors import DeadlineExceeded, Draining, InternalError, Overloaded
from tars.rpc.options import RpcOptions

_OPERATORS_RESERVE = 16
"""Calls that are not inference and may still start when `max_concurrent_calls` is reached: a full node must answer its operator."""
_LAST_PART = 8
"""One in so many places is kept for callers who hold few."""
_WANTED_SECONDS = 2.0
"""For so long a caller who was refused counts among those who want places: most come back sooner."""
_RETRY_AFTER_MS = 1000
"""A place is free again within about one short answer."""
_STOPPING_RETRY_MS = 5000
"""A node that is restarted takes calls again in about this time; whoever has another node asks that at once."""
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


class Admission:
    """The node's places for calls under way."""

    def __init__(self, options: RpcOptions) -> None:
        self._options = options
        self._active = 0
        self._held: Counter[str] = Counter()
        self._refused_at: dict[str, float] = {}
        # 64 random bits of this process and a count: as unique as 128 random ones, at a tenth of the price.
        self._trace_prefix = secrets.token_hex(8)
        self._trace_count = itertools.count(1)
        self._running: set[asyncio.Timeout] = set()
        self.closed = False
        """The node stops: no inference begins any more."""
        self._ended = False

    def close(self) -> None:
        """Refuse inference from now on, with `Draining`; what runs goes on."""
        self.closed = True

    def end(self) -> None:
        """The grace time is over: what still runs ends now, with `Draining`, so that its caller knows and sends it again elsewhere."""
        self.closed = self._ended = True
        now = asyncio.get_running_loop().time()
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(now)

    @property
    def active(self) -> int:
        """Calls that hold a place now."""
        return self._active

    def new_trace_id(self) -> str:
        """32 hexadecimal digits, as W3C trace context wants them."""
        return f"{self._trace_prefix}{next(self._trace_count):016x}"

    @asynccontextmanager
    async def within_bounds(
        self, timeout_ms: int | None, *, inference: bool = True, always: bool = False, caller: str = "local"
    ) -> AsyncIterator[Deadline]:
        """Holds a place and stops the work at its deadline (`timeout_ms` from now; None is the node's default).
        `always`: take a place also where none is free. `caller`: whose call it is.

        Raises `Overloaded` where no place is free, `DeadlineExceeded` when the time is over, `Draining` where the node stops.
        """
        if self.closed and inference and not always:
            raise stopping()
        most = self._options.max_concurrent_calls + (0 if inference else _OPERATORS_RESERVE)
        if self._active >= most and not always:
            self._refused_at[caller] = monotonic()
            raise Overloaded(
                f"This node already runs {self._active} calls, its limit, so the call was not started. Send it again a little "
                "later, to another node, or raise limits.max_concurrent_calls.",
                retry_after_ms=_RETRY_AFTER_MS,
                details={"limit": self._options.max_concurrent_calls},
            )
        if inference and not always and self._has_its_share(caller):
            raise Overloaded(
                f"This node runs {self._held[caller]} calls of this caller, and the few places that are left are for others, so the call "
                "was not started. Send it again a little later, to another node, or fewer at once.",
                retry_after_ms=_RETRY_AFTER_MS,
                details={"limit": self._options.max_concurrent_calls, "held": self._held[caller]},
            )
        seconds = (self._options.default_timeout_ms if timeout_ms is None else timeout_ms) / 1000
        deadline = Deadline(monotonic() + seconds)
        self._active += 1
        self._held[caller] += 1
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                if inference:
                    self._running.add(limit)
                yield deadline
        except TimeoutError:
            if not limit.expired():
                raise
            if self._ended and inference and not deadline.passed(monotonic()):
                raise stopping(began=True) from None
            raise DeadlineExceeded(
                f"The call did not end within its {seconds:g} s, so the work was stopped. Give it more with _meta.timeout_ms (over "
                "HTTP also the header X-Request-Timeout-Ms), or ask for less."
            ) from None
        finally:
            self._active -= 1
            self._held[caller] -= 1
            if not self._held[caller]:
                del self._held[caller]
            self._running.discard(limit)

    def _has_its_share(self, caller: str) -> bool:
        """Whether others go before it: nearly all places are taken, and it holds as many as an equal share of them."""
        most = self._options.max_concurrent_calls
        if self._active < most - most // _LAST_PART:
            return False
        now = monotonic()
        self._refused_at = {each: at for each, at in self._refused_at.items() if now - at < _WANTED_SECONDS}
        others = self._held.keys() | self._refused_at.keys() | {caller}
        return len(others) > 1 and self._held[caller] >= most / len(others)


def stopping(began: bool = False) -> Draining:
    """What a call gets that comes to a node which stops, or (`began`) that such a node could not finish in its grace time."""
    what = "and its grace time is over, so the work was ended" if began else "so nothing was run"
    return Draining(
        f"This node is being stopped, {what}. Send the call to another node, or to this one again once it is back.",
        retry_after_ms=_STOPPING_RETRY_MS,
    )


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace that the caller is in; a malformed `traceparent` starts a new one, as W3C trace context asks."""
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
    if match is None or match[1] == "ff" or not int(match[2], 16) or not int(match[3], 16):
        return None
    return match[2]


def internal_error() -> InternalError:
    """What a caller hears of a fault of ours; the log has the rest under the trace id."""
    return InternalError(
        "The node met a fault of its own; the call may or may not have had an effect. Report it with the trace id."
    )
