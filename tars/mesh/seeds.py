"""Addresses where a node of the mesh may be: those of the configuration, for ever, and those that discovery sees, while it sees them.

Law of this file: it says when to try which address, and resolves names anew each time; who is there is for the mesh machine and the
certificate to say. An address where a living member is known is left alone; one where nobody is, is tried ever more rarely, never given up.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tars.core.addresses import join, parse

_log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
"""A PC that is switched on is found within a minute even where nothing announces it. One packet a minute costs nobody anything."""
CHECK_SECONDS = 5.0
"""How soon a seed is tried after its node was seen to be gone."""
RESOLVE_SECONDS = 10.0
"""The resolver's own limit is often 5 s a server, two servers."""
MOST_ADDRESSES_OF_A_NAME = 8
MOST_DISCOVERED = 1024
"""More nodes than anybody has on one LAN; a flood of announcements ends here."""
TRIES_A_SECOND = 10.0
MOST_TRIES_AT_ONCE = 20
"""Each try is a TLS handshake: 10 a second is under 2 % of a core, and 1,000 seeds are still tried within two minutes."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host name, port) -> IP addresses; OSError where there are none."""


async def resolve_with_system(host: str, port: int) -> Sequence[str]:
    """Every address of a name, as the system orders them; OSError where the name is not known."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(slots=True)
class _Seed:
    addresses: tuple[str, ...]
    due: float
    wait: float = FIRST_WAIT_SECONDS
    tries: int = 0
    complained: bool = False


class Seeds:
    """`suggest(address)` is called with `ip:port`; `reached(address)` says whether a living member is known there."""

    def __init__(
        self,
        configured: Iterable[str],
        suggest: Callable[[str], None],
        reached: Callable[[str], bool],
        *,
        resolve: Resolve = resolve_with_system,
        first_wait: float = FIRST_WAIT_SECONDS,
        longest_wait: float = LONGEST_WAIT_SECONDS,
        dice: random.Random | None = None,
    ) -> None:
        self._suggest = suggest
        self._reached = reached
        self._resolve = resolve
        self._first_wait = first_wait
        self._longest_wait = longest_wait
        self._dice = dice or random.Random()
        self._configured = {address: self._new((str(parse(address)),)) for address in configured}
        self._discovered: dict[str, _Seed] = {}
        self._changed = asyncio.Event()

    def discovered(self, key: str, addresses: Sequence[str]) -> None:
        """Somebody announces a node there; the same again changes nothing. `key` tells announcements apart."""
        if not addresses:
            return self.withdrawn(key)
        known = self._discovered.get(key)
        if known is not None and known.addresses == tuple(addresses):
            return None
        if known is None and len(self._discovered) >= MOST_DISCOVERED:
            # Every newcomer gets one try; what was tried most often in vain makes room.
            del self._discovered[max(self._discovered, key=lambda each: self._discovered[each].tries)]
        self._discovered[key] = self._new(tuple(addresses))
        self._changed.set()
        return None

    def withdrawn(self, key: str) -> None:
        """It said goodbye, or its announcement ran out."""
        self._discovered.pop(key, None)

    def hurry(self) -> None:
        """Everything is tried at once: this PC's network changed, or everybody vanished."""
        for key, seed in self._configured.items():
            self._configured[key] = self._new(seed.addresses, complained=seed.complained)
        for key, seed in self._discovered.items():
            self._discovered[key] = self._new(seed.addresses)
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled. One seed whose name server hangs does not hold up the others."""
        clock = asyncio.get_running_loop().time
        tokens, filled = float(MOST_TRIES_AT_ONCE), clock()
        names: dict[asyncio.Task[None], _Seed] = {}
        try:
            while True:
                now = clock()
                tokens, filled = min(MOST_TRIES_AT_ONCE, tokens + (now - filled) * TRIES_A_SECOND), now
                names = {task: seed for task, seed in names.items() if not task.done()}
                waiting = [seed for seed in self._all() if not any(seed is busy for busy in names.values())]
                for seed in sorted((seed for seed in waiting if seed.due <= now), key=lambda seed: seed.due):
                    if any(self._reached(address) for address in seed.addresses):
                        seed.due, seed.wait = now + CHECK_SECONDS, self._first_wait
                        continue
                    if tokens < 1:
                        break
                    tokens -= 1
                    seed.tries += 1
                    seed.due = now + seed.wait * self._dice.uniform(0.8, 1.2)
                    seed.wait = min(seed.wait * 2, self._longest_wait)
                    if all(parse(address).ip is not None for address in seed.addresses):
                        for address in seed.addresses:
                            self._suggest(address)
                    else:
                        names[asyncio.create_task(self._try_names(seed))] = seed
                await self._until(min((seed.due for seed in waiting), default=now + CHECK_SECONDS), names)
        finally:
            for task in names:
                task.cancel()
            await asyncio.gather(*names, return_exceptions=True)

    def _all(self) -> list[_Seed]:
        return [*self._configured.values(), *self._discovered.values()]

    def _new(self, addresses: tuple[str, ...], complained: bool = False) -> _Seed:
        return _Seed(addresses, due=0.0, wait=self._first_wait, complained=complained)

    async def _until(self, due: float, names: Iterable[asyncio.Task[None]]) -> None:
        """Until then, at least a tenth of a second (what the pace allows), unless something changes."""
        clock = asyncio.get_running_loop().time
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            seconds = max(1 / TRIES_A_SECOND, due - clock())
            await asyncio.wait([changed, *names], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        self._changed.clear()

    async def _try_names(self, seed: _Seed) -> None:
        for address in seed.addresses:
            endpoint = parse(address)
            if endpoint.ip is not None:
                self._suggest(address)
                continue
            found: Sequence[str] = ()
            reason = "it has no address"
            try:
                async with asyncio.timeout(RESOLVE_SECONDS):
                    found = await self._resolve(endpoint.host, endpoint.port)
            except TimeoutError:
                reason = "no name server answered"
            except (OSError, UnicodeError) as error:
                reason = str(error) or type(error).__name__
            usable: list[str] = []
            for host in found[:MOST_ADDRESSES_OF_A_NAME]:
                with suppress(ValueError):
                    usable.append(join(host, endpoint.port))
            if usable:
                seed.complained = False
            elif not seed.complained:
                # Once, not with every try: a PC that is off for a week fills no log.
                _log.warning("the seed %s is not known to the name server (%s); it is tried again", address, reason)
                seed.complained = True
            # A name behind which a living member is (a round robin over all nodes) needs no try.
            if not any(self._reached(address) for address in usable):
                for address in usable:
                    self._suggest(address)
