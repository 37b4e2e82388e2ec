"""Connections between simulated processes, as TCP makes them: in order, late where packets are lost, silent where the way is cut.

Law of this file: it knows addresses, ways between them and processes that end; what is said is not its own. Whoever is cut off from
somebody hears nothing of it; only a process that ended, on a PC that still runs, says so. Weather and cuts are `virtual_network`'s.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from virtual_network import VirtualNetwork
from virtual_time import VirtualTime

from tars.rpc.peer_connections import SILENT_SECONDS

RETRANSMIT_SECONDS = 0.2
"""TCP's least, doubled each time."""
DIAL_SECONDS = 5.0
"""A way that swallows packets ends a new connection's patience (`rpc.http_client`)."""
GIVE_UP_SECONDS = 15.0
"""What cannot be sent for so long ends a connection."""

Reply = Callable[[Any], None]
Asked = Callable[[Any, Reply], None]
"""What a process does with a question: it may reply at any time, once."""


class End:
    """One end of a connection. Set `heard` and `lost` before anything can come; `lost` is told whether anything may have arrived."""

    __slots__ = ("_blocked", "_last", "_wire", "address", "closed", "heard", "lost", "other")

    def __init__(self, wire: Wire, address: str):
        self.address = address
        self.closed = False
        self.heard: Callable[[Any], None] = lambda body: None
        self.lost: Callable[[bool], None] = lambda sent: None
        self.other: End
        self._wire = wire
        self._last = 0.0
        self._blocked: deque[Any] = deque()

    def say(self, body: Any) -> None:
        """Send it after all that was said before."""
        if not self.closed:
            self._blocked.append(body)
            if len(self._blocked) == 1:
                self._pump(self._wire.time.now)

    def close(self) -> None:
        """The other end hears of it after what was said, if it can hear at all."""
        if not self.closed:
            self.say(CLOSED)
            self._wire.forget(self)

    def _pump(self, since: float) -> None:
        wire = self._wire
        now = wire.time.now
        while self._blocked:
            delay = wire.delay(self.address, self.other.address)
            if delay is None:
                if now - since < GIVE_UP_SECONDS:
                    wire.time.after(2 * RETRANSMIT_SECONDS, lambda: self._pump(since))
                elif not self.closed:
                    wire.forget(self)
                    self.lost(True)
                return
            if delay > SILENT_SECONDS and self._blocked[0] is not CLOSED:
                # What stays is said by nobody: the connection ends before it is through.
                wire.time.after(SILENT_SECONDS, self._breaks)
                return
            body = self._blocked.popleft()
            self._last = max(self._last, now + delay)
            wire.time.at(self._last, lambda body=body: self._arrive(body))  # type: ignore[misc]

    def _breaks(self) -> None:
        """Nothing was acknowledged for too long; the other end's kernel asks, and is told that there is no such connection."""
        for end in (self, self.other):
            if not end.closed:
                self._wire.forget(end)
                end.lost(True)

    def _arrive(self, body: Any) -> None:
        other = self.other
        if other.closed:
            return
        if body is CLOSED:
            self._wire.forget(other)
            other.lost(True)
        else:
            other.heard(body)


CLOSED = object()


class Wire:
    """See the module's law. `accept` of a process takes the connections that come to its address, `asked` its questions."""

    def __init__(self, time: VirtualTime, network: VirtualNetwork, dice: random.Random):
        self.time = time
        self._network = network
        self._random = dice.random
        self._accept: dict[str, Callable[[End, Any], None]] = {}
        self._asked: dict[str, Asked] = {}
        self._open: dict[str, dict[End, None]] = {}

    def serve(self, address: str, accept: Callable[[End, Any], None], asked: Asked) -> None:
        """A process listens."""
        self._accept[address], self._asked[address] = accept, asked

    def ended(self, address: str, *, power: bool = True) -> None:
        """The process at an address ended. `power` False: its PC with it, and nobody is told."""
        self._accept.pop(address, None)
        self._asked.pop(address, None)
        for end in list(self._open.pop(address, ())):
            if power:
                end.say(CLOSED)
            end.closed = True

    def connect(
        self, here: str, there: str, request: Any, heard: Callable[[Any], None], lost: Callable[[bool], None]
    ) -> End:
        """Connect and say `request`; `lost(False)` where nobody was reached."""
        near, far = End(self, here), End(self, there)
        near.other, far.other = far, near
        near.heard, near.lost = heard, lost
        self._open.setdefault(here, {})[near] = None
        self._dial(near, request, self.time.now)
        return near

    def ask(self, here: str, there: str, question: Any, reply: Callable[[Any], None]) -> None:
        """A question on a connection of its own; `reply` hears None where nobody listens, and nothing where the way is cut. It may arrive
        twice: whoever asks sends again what was not acknowledged."""
        delay = self.delay(here, there, dial=True)
        if delay is None:
            return
        heard = False

        def back(answer: Any) -> None:
            later = self.delay(there, here)
            if later is not None:
                self.time.after(later, lambda: once(answer))

        def once(answer: Any) -> None:
            nonlocal heard
            if not heard:
                heard = True
                reply(answer)

        def arrive() -> None:
            asked = self._asked.get(there)
            if asked is None:
                back(None)
            else:
                asked(question, back)

        self.time.after(delay, arrive)
        duplication = self._network.weather.duplication
        if duplication and self._random() < duplication:
            self.time.after(delay + self._random(), arrive)

    def delay(self, sender: str, receiver: str, *, dial: bool = False) -> float | None:
        """Seconds until what is sent now arrives; None: never."""
        if not self._network.passes(sender, receiver, dial=dial):
            return None
        weather = self._network.weather
        delay = weather.delay + weather.jitter * self._random()
        if weather.slow and self._random() < weather.slow:
            delay += self._random()
        again = RETRANSMIT_SECONDS
        while weather.loss and self._random() < weather.loss:
            delay += again
            again *= 2
        return delay

    def forget(self, end: End) -> None:
        end.closed = True
        self._open.get(end.address, {}).pop(end, None)

    def _dial(self, near: End, request: Any, since: float) -> None:
        here, there = near.address, near.other.address
        if near.closed:
            return
        delay = self.delay(here, there, dial=True)
        if delay is None or not self._network.passes(there, here):
            if self.time.now - since < DIAL_SECONDS:
                self.time.after(2 * RETRANSMIT_SECONDS, lambda: self._dial(near, request, since))
            else:
                self._refused(near)
            return

        def arrive() -> None:
            accept = self._accept.get(there)
            if accept is None:
                back = self.delay(there, here)
                if back is None:
                    self._dial(near, request, since)
                else:
                    self.time.after(back, lambda: self._refused(near))
                return
            self._open.setdefault(there, {})[near.other] = None
            accept(near.other, request)

        if delay > SILENT_SECONDS:
            self.time.after(SILENT_SECONDS, near._breaks)
            return
        near._last = self.time.now + delay
        self.time.after(delay, arrive)

    def _refused(self, near: End) -> None:
        if not near.closed:
            self.forget(near)
            near.lost(False)
