"""The network between simulated nodes: exchanges of envelopes that may be late, lost, doubled, overtaken, and cut off in one direction.

Law of this file: it knows packets and who is cut off from whom, nothing of what envelopes mean. An exchange is what the real transport
does (a request, and answers on the same connection); of a failed one the asker hears, after the transport's patience, as there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from virtual_time import VirtualTime

from tars.core.mesh_messages import Envelope

Answer = Callable[[Sequence[Envelope] | None], None]
"""Gives the answers back to the asker; None: refused, as by a PC where nobody listens."""
Serve = Callable[[Envelope, Answer], None]
"""What a listener does with a request."""


@dataclass(slots=True)
class Weather:
    """How every link behaves just now. Shares are of packets, times in seconds."""

    delay: float = 0.001
    jitter: float = 0.001
    """A packet takes `delay` and up to `jitter` more, so packets overtake each other."""
    loss: float = 0.0
    duplication: float = 0.0
    slow: float = 0.0
    """This share of packets takes up to a second more (a Wi-Fi that retries)."""


class VirtualNetwork:
    """Listeners by address. `patience` is how long the transport waits for an answer before it says that nobody answers."""

    def __init__(self, time: VirtualTime, dice: random.Random, *, patience: float = 1.0):
        self.weather = Weather()
        self.packets = 0
        self._time = time
        self._random = dice.random
        self._patience = patience
        self._listeners: dict[str, Serve] = {}
        self._silent: set[tuple[str, str]] = set()
        """(from, to): packets of that direction vanish."""
        self._undialled: set[tuple[str, str]] = set()
        """(from, to): `from` cannot connect to `to`, though answers pass (a firewall, an address translation)."""

    def listen(self, address: str, serve: Serve | None) -> None:
        """From now on `serve` gets what comes to `address`; None: nobody listens, and connections are refused at once."""
        if serve is None:
            self._listeners.pop(address, None)
        else:
            self._listeners[address] = serve

    def cut(self, senders: Iterable[str], receivers: Iterable[str], *, dial_only: bool = False) -> None:
        """Nothing passes any more from these to those (one direction); with `dial_only` only new connections do not."""
        receivers = list(receivers)
        pairs = {(sender, receiver) for sender in senders for receiver in receivers if sender != receiver}
        (self._undialled if dial_only else self._silent).update(pairs)

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        self._silent.clear()
        self._undialled.clear()

    @property
    def whole(self) -> bool:
        """Whether nobody is cut off from anybody."""
        return not self._silent and not self._undialled

    @property
    def weather_is_fair(self) -> bool:
        """Whether packets arrive, and soon."""
        return self.weather.loss <= 0.02 and not self.weather.slow

    def passes(self, sender: str, receiver: str, *, dial: bool = False) -> bool:
        """Whether what `sender` says now, or dials, comes to `receiver`."""
        return (sender, receiver) not in self._silent and not (dial and (sender, receiver) in self._undialled)

    def exchange(self, sender: str, receiver: str, envelope: Envelope, done: Answer) -> None:
        """Send a request; `done` hears the answers once, or None where it failed."""
        answered = False

        def finish(answers: Sequence[Envelope] | None) -> None:
            nonlocal answered
            if not answered:
                answered = True
                done(answers)

        def answer(answers: Sequence[Envelope] | None) -> None:
            self._carry(receiver, sender, lambda: finish(answers))

        def arrive() -> None:
            serve = self._listeners.get(receiver)
            if serve is None:
                answer(None)
            else:
                serve(envelope, answer)

        if (sender, receiver) not in self._undialled:
            self._carry(sender, receiver, arrive)
        self._time.after(self._patience, lambda: finish(None))

    def _carry(self, sender: str, receiver: str, arrive: Callable[[], None]) -> None:
        self.packets += 1
        if (sender, receiver) in self._silent:
            return
        weather = self.weather
        copies = 1
        if weather.loss or weather.duplication:
            chance = self._random()
            if chance < weather.loss:
                return
            if chance > 1.0 - weather.duplication:
                copies = 2
        for _ in range(copies):
            delay = weather.delay + weather.jitter * self._random()
            if weather.slow and self._random() < weather.slow:
                delay += self._random()
            self._time.after(delay, arrive)
