"""When a peer is asked whether it lives while calls run there, and when its silence means that it is frozen.

Law of this file: pure; `now` is a monotonic clock in seconds, and a driver (`serving/peer_pulses.py`) performs the effects. Membership
finds the dead for the whole mesh, in seconds, and forgives; this is for the calls of one node at one peer, which cannot wait so long. A
process that is stopped (SIGSTOP, swapped out, a PC asleep) keeps its connections, and its kernel acknowledges every byte: only an answer
is a sign of life.

A peer with calls is asked every `INTERVAL`. It is silent once it was asked, and nothing came for srtt + 4 rttvar (RFC 6298), kept within 1
and 2 seconds. So a frozen peer is known 1.0 to 2.5 s after its last word. A silent peer is asked on, with and without calls, so that it is
usable in the moment in which it thaws.

If this node itself was stopped or too busy to listen, nobody is to blame: a tick that comes late starts the patience anew.
"""

from __future__ import annotations

from dataclasses import dataclass

INTERVAL = 0.5
"""Seconds between two pings of a peer that has calls."""
FIRST = 0.25
"""Seconds from the first call until the first ping: most calls of embeddings are over before."""
INITIAL_TIMEOUT = 1.5
"""Seconds, before anything was measured."""
TIMEOUT_LEAST = 1.0
"""A busy Python process answers a ping within 0.3 s, mostly."""
TIMEOUT_MOST = 2.0
"""With `INTERVAL` the promise: nobody waits longer than 2.5 s for a frozen peer."""
OWN_STALL = 0.3
"""A tick that comes so much too late says that this node did not listen either."""


@dataclass(frozen=True, slots=True)
class SendPing:
    """Ask it; tell `answered(number)` when anything at all comes back from it, an error too."""

    number: int


@dataclass(frozen=True, slots=True)
class Cut:
    """It is silent: break its calls, they go on elsewhere. `seconds`: since its last sign of life."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Restore:
    """It is heard again. `seconds`: how long it was silent."""

    seconds: float


PulseEffect = SendPing | Cut | Restore


class Pulse:
    """One peer's; see the module's law. Every input returns what is to be done; `wake` says when `tick` is due next."""

    def __init__(self, now: float):
        self.calls = 0
        self.silent = False
        self.wake: float | None = None
        """None: nothing to do until the next call."""
        self._heard = now
        self._asked: float | None = None
        """When the first ping was sent since it was heard last."""
        self._last_ping = float("-inf")
        self._number = 0
        self._sent: dict[int, float] = {}
        self._srtt: float | None = None
        self._rttvar = 0.0

    @property
    def timeout(self) -> float:
        """Seconds that a ping may take, as learned."""
        if self._srtt is None:
            return INITIAL_TIMEOUT
        return min(TIMEOUT_MOST, max(TIMEOUT_LEAST, self._srtt + 4 * self._rttvar))

    def call_began(self, now: float) -> list[PulseEffect]:
        """A call is at the peer now."""
        self.calls += 1
        if self.calls == 1 and not self.silent:
            # What was before is no silence: nobody asked. And most calls are over before a first ping is due.
            self._heard = now
            self._asked = None
            self._last_ping = max(self._last_ping, now + FIRST - INTERVAL)
        return self._next(now)

    def call_ended(self, now: float) -> list[PulseEffect]:
        """However it ended."""
        self.calls -= 1
        return self._next(now)

    def heard(self, now: float) -> list[PulseEffect]:
        """A piece of an answer, or anything else, came from it."""
        before, self._heard, self._asked = self._heard, now, None
        if not self.silent:
            return []
        self.silent = False
        # Those that waited while it was frozen say nothing about its way.
        self._sent.clear()
        return [Restore(now - before), *self._next(now)]

    def answered(self, number: int, now: float) -> list[PulseEffect]:
        """A ping came back."""
        sent = self._sent.pop(number, None)
        if sent is not None and not self.silent:
            # Not of a peer that was frozen: how long it slept is not how fast it is.
            seconds = now - sent
            if self._srtt is None:
                self._srtt, self._rttvar = seconds, seconds / 2
            else:
                self._rttvar += (abs(self._srtt - seconds) - self._rttvar) / 4
                self._srtt += (seconds - self._srtt) / 8
        return self.heard(now)

    def unanswered(self, number: int) -> None:
        """A ping was given up: nothing came back, or there was no way to it. That alone is no verdict."""
        self._sent.pop(number, None)

    def tick(self, now: float) -> list[PulseEffect]:
        """Time passed: call it at `wake`, or a little later."""
        if self.wake is None or now < self.wake:
            return []
        late = now - self.wake
        if late > OWN_STALL:
            self._sent.clear()
            self._heard = min(now, self._heard + late)
            if self._asked is not None:
                self._asked = min(now, self._asked + late)
        return self._next(now)

    def _next(self, now: float) -> list[PulseEffect]:
        """What is due, and when something is due next."""
        if not self.calls and not self.silent:
            self.wake = None
            return []
        effects: list[PulseEffect] = []
        if not self.silent and self._asked is not None and now >= self._asked + self.timeout:
            self.silent = True
            effects.append(Cut(now - self._heard))
        if now >= self._last_ping + INTERVAL:
            self._number += 1
            self._last_ping = now
            self._sent[self._number] = now
            if self._asked is None:
                self._asked = now
            effects.append(SendPing(self._number))
        self.wake = self._last_ping + INTERVAL
        if not self.silent and self._asked is not None:
            self.wake = min(self.wake, self._asked + self.timeout)
        return effects
