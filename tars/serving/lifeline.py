"""What all calls of this node at one peer hang on: it can be cut, and held again.

Law of this file: it knows no peer and no network; whoever knows that the peer is dead or silent cuts it (`peer_pulses`), and whoever
watches the peer is told of its calls and of each piece that comes.

A PC that lost its power or its cable closes no connection, and the kernel of a frozen process acknowledges every byte: a call would wait
there for all of its time. Of the dead nothing comes any more; a silent peer may only be busy, and a call is broken there only where another
replica can take it: one that nobody else can answer gains nothing by being broken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

LAST_WORDS_SECONDS = 0.5
"""How long is still waited for the next piece of a peer that was given up: a living one sends several tokens in this time."""

_Awaited = TypeVar("_Awaited")


class LineCut(Exception):
    """What was waited for will not come: the line was cut. Never leaves `serving`."""


class Watch(Protocol):
    """Who watches the peer."""

    def call_began(self) -> None:
        """A call is there now."""
        ...

    def call_ended(self) -> None:
        """However it ended."""
        ...

    def heard(self) -> None:
        """Something came from there."""
        ...


class _Nobody:
    """Where nobody watches."""

    def call_began(self) -> None:
        """Nothing."""

    def call_ended(self) -> None:
        """Nothing."""

    def heard(self) -> None:
        """Nothing."""


class Lifeline:
    """See the module's law. `watch` is told of every call at the peer."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch: Watch = watch or _Nobody()
        self.why: str | None = None
        """Why it is cut, for people, after the peer's name; None while it holds."""
        self.dead = False
        """Cut for good. Otherwise it may be held again."""
        self._waits: dict[asyncio.Timeout, Callable[[], bool]] = {}

    def broken_for(self, spare: Callable[[], bool]) -> bool:
        """Whether a call here has nothing to wait for. `spare`: another replica can take it."""
        return self.why is not None and (self.dead or spare())

    async def hold(self, waiting: Awaitable[_Awaited], spare: Callable[[], bool] = lambda: True) -> _Awaited:
        """What `waiting` gives. Raises `LineCut` when the line is cut meanwhile; `waiting` is cancelled then."""
        # Without a timer, mostly: it costs two method calls a delta.
        scope = asyncio.timeout(LAST_WORDS_SECONDS if self.why is not None and self.broken_for(spare) else None)
        self._waits[scope] = spare
        try:
            async with scope:
                came = await waiting
        except TimeoutError:
            if not scope.expired():
                raise
            raise LineCut from None
        finally:
            self._waits.pop(scope, None)
        self.watch.heard()
        return came

    def cut(self, why: str, *, dead: bool) -> None:
        """Break its calls. Who was not waiting just now has a moment to take what may have come already."""
        self.why, self.dead = why, self.dead or dead
        self.sweep()

    def sweep(self) -> None:
        """Break the calls that another replica can take by now. Nothing where the line holds."""
        now = asyncio.get_running_loop().time()
        for scope, spare in list(self._waits.items()):
            if self.broken_for(spare):
                del self._waits[scope]
                scope.reschedule(now)

    def restore(self) -> None:
        """It is heard again: new calls may go there, and what was not broken goes on."""
        if not self.dead:
            self.why = None
