"""Asks the peers that have calls of this node whether they live, and cuts the lifelines of those that do not answer.

Law of this file: the driver of `core.pulse`, one pulse for a peer and not for a call. It performs its effects with tasks and a timer, and
decides nothing. Whoever wants to know who fell silent, and who was heard again, is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from tars.core.pulse import Cut, Pulse, PulseEffect, Restore, SendPing
from tars.core.types import NodeId
from tars.errors import DeadlineExceeded, PeerUnreachable, ServerStateError, TarsError
from tars.serving.lifeline import Lifeline

log = logging.getLogger(__name__)

PING_SECONDS = 3.0
"""A ping is given up after this: long enough for one that waits in a frozen peer's socket to be answered when it thaws, and so few that a
peer that is frozen for an hour costs six waiting connections."""

DEAD = "is dead, as the mesh sees it"
SILENT = "gives no sign of life: it is frozen, asleep or cut off"


class PeerPulses:
    """One per node. `ping` asks a peer anything; whatever it answers, it lives. `silent` and `heard` are told of each change."""

    def __init__(
        self,
        ping: Callable[[NodeId], Awaitable[object]],
        silent: Callable[[NodeId], None] = lambda node: None,
        heard: Callable[[NodeId], None] = lambda node: None,
        name: Callable[[NodeId], str] = str,
        now: Callable[[], float] = time.monotonic,
    ):
        self._ping = ping
        self.silent = silent
        self.heard = heard
        self.name = name
        self._now = now
        self._peers: dict[NodeId, _Watched] = {}
        self.times_silent = 0
        """How often a peer fell silent since the start."""

    def lifeline(self, node: NodeId) -> Lifeline:
        """What calls at this peer hang on."""
        watched = self._peers.get(node)
        if watched is None:
            watched = self._peers[node] = _Watched(node, self, self._ping, self._now)
        return watched.lifeline

    def is_silent(self, node: NodeId) -> bool:
        """Whether it was asked and says nothing."""
        watched = self._peers.get(node)
        return watched is not None and watched.pulse.silent

    def died(self, node: NodeId) -> None:
        """Membership gave the peer up: what waits for it is broken, and nobody asks it any more. When it is back it starts anew."""
        watched = self._peers.pop(node, None)
        if watched is not None:
            watched.lifeline.cut(DEAD, dead=True)
            watched.stop()

    async def close(self) -> None:
        """Ask nobody any more."""
        pings = [ping for watched in self._peers.values() for ping in watched.stop()]
        self._peers.clear()
        if pings:
            await asyncio.wait(pings)


class _Watched:
    """One peer's pulse, its timer and its pings."""

    def __init__(
        self, node: NodeId, owner: PeerPulses, ping: Callable[[NodeId], Awaitable[object]], now: Callable[[], float]
    ):
        self.pulse = Pulse(now())
        self.lifeline = Lifeline(self)
        self._node = node
        self._owner = owner
        self._ping = ping
        self._now = now
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0
        self._pings: set[asyncio.Task[None]] = set()
        self._stopped = False

    # --- `lifeline.Watch` --------------------------------------------------------------------------------------------

    def call_began(self) -> None:
        """A call is there now."""
        self._perform(self.pulse.call_began(self._now()))

    def call_ended(self) -> None:
        """However it ended."""
        self._perform(self.pulse.call_ended(self._now()))

    def heard(self) -> None:
        """Something came from there: for each token, so no timer is touched."""
        if effects := self.pulse.heard(self._now()):
            self._perform(effects)

    # --- inside ------------------------------------------------------------------------------------------------------

    def stop(self) -> set[asyncio.Task[None]]:
        """Ask no more; the pings that end now."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for ping in self._pings:
            ping.cancel()
        return self._pings

    def _perform(self, effects: list[PulseEffect]) -> None:
        if self._stopped:
            return
        for effect in effects:
            match effect:
                case SendPing(number):
                    if self.pulse.silent:
                        self.lifeline.sweep()
                    task = asyncio.get_running_loop().create_task(self._ask(number))
                    self._pings.add(task)
                    task.add_done_callback(self._pings.discard)
                case Cut(seconds):
                    self._owner.times_silent += 1
                    log.warning(
                        "node %s says nothing since %.1f s, although it was asked: its %d calls go on elsewhere where they can",
                        self._owner.name(self._node),
                        seconds,
                        self.pulse.calls,
                    )
                    self.lifeline.cut(SILENT, dead=False)
                    self._owner.silent(self._node)
                case Restore(seconds):
                    log.warning(
                        "node %s is heard again after %.1f s, and gets calls again",
                        self._owner.name(self._node),
                        seconds,
                    )
                    self.lifeline.restore()
                    self._owner.heard(self._node)
        self._arm()

    def _arm(self) -> None:
        """One timer, at the pulse's next wake; one that comes too early finds nothing due and is set again."""
        wake = self.pulse.wake
        if wake is None or (self._timer is not None and self._wakes_at <= wake):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = wake
        self._timer = asyncio.get_running_loop().call_later(max(0.0, wake - self._now()), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._perform(self.pulse.tick(self._now()))

    async def _ask(self, number: int) -> None:
        answered = False
        try:
            async with asyncio.timeout(PING_SECONDS):
                await self._ping(self._node)
            answered = True
        except (PeerUnreachable, DeadlineExceeded, TimeoutError):
            pass
        except TarsError as refused:
            # A full or draining node says so itself; who is refused at the door may have asked somebody else.
            answered = isinstance(refused, ServerStateError)
        if answered:
            self._perform(self.pulse.answered(number, self._now()))
        else:
            self.pulse.unanswered(number)
