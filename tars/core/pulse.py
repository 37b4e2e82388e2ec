"""When a peer is asked whether it lives while calls run there, and when its silence means that it is frozen.

Law of this file: pure; `now` is a monotonic clock in seconds, and a driver (`serving/peer_pulses.py`) performs the effects. Membership
finds the dead for the whole mesh, in seconds, and forgives; this is for the calls of one node at one peer, which cannot wait so long. A
process that is stopped (SIGSTOP, swapped out, a PC asleep) keeps its connections, and its kernel acknowledges every byte: only an answer
is a sign of life.

A peer with calls is asked every `INTERVAL`. It is silent once it was asked, and nothing came for srtt + 4 rttvar (RFC 6298), kept within 1
and 2 seconds. So a frozen peer is known 1.0 to 2.5 s after its last word. A silent peer is asked on, with and without calls, so that it is
usable in the moment in which it thaws.

A peer that drowns in work is not frozen. One that answered a ping after r seconds a moment ago, up to `BUSY_MOST`, is given 1.5 r, and half
of that 20 s later; so one that was taken for frozen although it was busy is not taken for it again at once. And what this node itself was
too late to listen to is nobody's silence: as much as a tick comes late, so much more patience there is.
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
BUSY_MOST = 5.0
"""Seconds that a peer has which was slow before. Streams do not wait so long: their own gaps are learned."""
BUSY_FACTOR, BUSY_HALF_LIFE = 1.5, 20.0
OWN_STALL = 0.3
"""A tick that comes so much too late says that pings were not measured: this node did not listen."""
PUNCTUAL = 0.005
"""No timer is more exact."""
ROUNDING = 1e-6
LISTEN = 0.1
"""Seconds that a node which was late has to read what came meanwhile; once in a silence."""


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
        self._excused = False
        """This silence has been given `LISTEN` already."""
        self._last_ping = float("-inf")
        self._number = 0
        self._sent: dict[int, float] = {}
        self._srtt: float | None = None
        self._rttvar = 0.0
        self._slowest, self._slowest_at = 0.0, now
        """The slowest answer of late, and when it came."""

    def patience(self, now: float) -> float:
        """Seconds that a ping may take, as learned."""
        learned = INITIAL_TIMEOUT if self._srtt is None else self._srtt + 4 * self._rttvar
        usual = min(TIMEOUT_MOST, max(TIMEOUT_LEAST, learned))
        return max(usual, min(BUSY_MOST, BUSY_FACTOR * self._slow(now)))

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
        before, self._heard, self._asked, self._excused = self._heard, now, None, False
        if not self.silent:
            return []
        self.silent = False
        # Those that waited while it was frozen say nothing about its way.
        self._sent.clear()
        return [Restore(now - before), *self._next(now)]

    def answered(self, number: int, now: float) -> list[PulseEffect]:
        """A ping came back."""
        sent = self._sent.pop(number, None)
        if sent is not None:
            self._measured(now - sent, now)
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
        if late > PUNCTUAL:
            self._heard = min(now, self._heard + late)
            if self._asked is not None:
                # Its answer may lie here unread: what came meanwhile is read after this tick.
                unread = 0.0 if self._excused else LISTEN
                self._asked, self._excused = self._asked + late + unread, True
        return self._next(now)

    def _measured(self, seconds: float, now: float) -> None:
        # How long a frozen peer slept is not how slow it is.
        if seconds <= BUSY_MOST and seconds >= self._slow(now):
            self._slowest, self._slowest_at = seconds, now
        if self.silent:
            return
        if self._srtt is None:
            self._srtt, self._rttvar = seconds, seconds / 2
        else:
            self._rttvar += (abs(self._srtt - seconds) - self._rttvar) / 4
            self._srtt += (seconds - self._srtt) / 8

    def _slow(self, now: float) -> float:
        return float(self._slowest * 0.5 ** ((now - self._slowest_at) / BUSY_HALF_LIFE))

    def _next(self, now: float) -> list[PulseEffect]:
        """What is due, and when something is due next."""
        if not self.calls and not self.silent:
            self.wake = None
            return []
        effects: list[PulseEffect] = []
        if not self.silent and self._asked is not None and now >= self._asked + self.patience(now) - ROUNDING:
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
            self.wake = min(self.wake, self._asked + self.patience(now))
        return effects
