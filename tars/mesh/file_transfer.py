"""Brings one file here from several sources at once: ranges into a `.partial` file, verified, then renamed into place.

Law of this file: nothing that was not verified ever stands at the target. What came stays through a cancel, a full disk and a kill -9
(`partial_file`). Which piece comes from where is `core.transfer`'s decision.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Protocol

from tars.core import transfer as core
from tars.mesh.partial_file import PartialFile, WantedFile

log = logging.getLogger(__name__)

IDLE_SECONDS = 15.0
"""A source that sends nothing for so long is asked no more for this piece: a PC that sleeps keeps its connections open."""
MOST_LANES = 8
"""Pieces under way at once, each in memory until it is whole: 128 MiB."""
TICK_SECONDS = 0.25
"""How often progress is told and slow pieces are looked at."""
RATE_SECONDS = 3.0
"""The rate that people see is the mean of so long."""


class SourceFailed(Exception):
    """A source did not give a range. `final`: it never will. `pause`: it is busy, ask again after so many seconds."""

    def __init__(self, reason: str, *, final: bool = False, pause: float | None = None):
        super().__init__(reason)
        self.reason = reason
        self.final = final
        self.pause = pause


class SourcesExhausted(Exception):
    """No source gave the whole file. `reasons`: title -> what was wrong; `liars`: titles of those that gave wrong bytes."""

    def __init__(self, reasons: Mapping[str, str], liars: Sequence[str] = ()):
        super().__init__("; ".join(f"{title}: {reason}" for title, reason in reasons.items()))
        self.reasons = dict(reasons)
        self.liars = tuple(liars)


class Source(Protocol):
    """Somebody who has the file."""

    @property
    def name(self) -> str:
        """Stable over restarts, for the journal: a node's id, or `hub`."""
        ...

    @property
    def title(self) -> str:
        """For people: a node's name, or `Hugging Face`."""
        ...

    def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `start` up to, not including, `stop`, in pieces of any size. Raises `SourceFailed` and nothing else on purpose."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is. `stage`: `fetch`, then `verify`."""

    stage: str
    bytes_done: int
    bytes_total: int
    bytes_per_second: float = 0.0
    sources: tuple[str, ...] = ()
    """Titles of those that give now."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a transfer went."""

    sources: tuple[str, ...]
    """Titles of those whose bytes are in the file, sorted."""
    liars: tuple[str, ...] = ()
    """Names of those that gave wrong bytes."""


class FileTransfer:
    """One file on its way; `run` once. After a failure or a cancel make another one, which goes on where this one was."""

    def __init__(
        self,
        wanted: WantedFile,
        sources: Sequence[Source],
        *,
        bandwidth: core.TokenBucket | None = None,
        report: Callable[[Progress], None] = lambda progress: None,
        piece: int = core.PIECE,
        idle_seconds: float = IDLE_SECONDS,
    ):
        self._wanted = wanted
        self._sources = {source.name: source for source in sources}
        self._bandwidth = bandwidth or core.TokenBucket(None)
        self._report = report
        self._piece = piece
        self._idle_seconds = idle_seconds
        self._file = PartialFile(wanted, piece)
        self._saves: set[asyncio.Future[None]] = set()
        self._reasons: dict[str, str] = {}
        self._note = ""
        self._rates: deque[tuple[float, int]] = deque()
        self._came = 0

    async def run(self) -> Outcome:
        """Fetch, verify, rename. Raises `SourcesExhausted`, `DiskFull` (what came is kept) or `BadModelFile` (this disk fails)."""
        await asyncio.to_thread(self._file.open)
        try:
            liars = await self._until_right()
        except OSError as error:
            raise self._file.failed(error) from error
        finally:
            try:
                if self._saves:
                    await asyncio.wait(self._saves)  # a thread that writes must end before its descriptor does
            finally:
                self._file.close()
        await asyncio.to_thread(self._file.move)
        from_whom = {self._title(source) for source, _ in self._file.journal.now.values()}
        return Outcome(tuple(sorted(from_whom)), liars)

    # --- rounds -------------------------------------------------------------------------------------------------------

    async def _until_right(self) -> tuple[str, ...]:
        """Fetch from all at once; if the whole is wrong, from one at a time, which shows who gave the wrong bytes."""
        await self._round(self._sources)
        if await self._verified():
            return ()
        damaged = await asyncio.to_thread(self._file.damaged)
        if damaged:
            log.warning("%s: %d pieces changed on this disk since they came", self._wanted.target.name, len(damaged))
            for piece in damaged:
                del self._file.journal.now[piece]
            await self._round(self._sources)
            if await self._verified():
                return ()
        return await self._one_at_a_time()

    async def _one_at_a_time(self) -> tuple[str, ...]:
        liars: set[str] = set()
        for name, source in self._sources.items():
            mine = {
                piece: row
                for piece, row in self._file.journal.now.items()
                if self._file.journal.claims.get((name, piece)) == row[1]
            }
            if len(mine) < self._file.pieces:
                self._note = f"what came together was wrong; fetching from {source.title} alone"
                self._file.journal.now = mine
                try:
                    await self._round({name: source})
                except SourcesExhausted:
                    continue
                if await self._verified():
                    truth = {piece: digest for piece, (_, digest) in self._file.journal.now.items()}
                    claims = [(who, piece, digest) for (who, piece), digest in self._file.journal.claims.items()]
                    return tuple(sorted(liars | set(core.liars(claims, truth))))
            liars.add(name)
            self._reasons[name] = "it gave wrong bytes: they do not hash to what it says that they are"
        # Nothing of it is worth keeping: the next attempt starts afresh.
        await asyncio.to_thread(self._file.discard)
        raise SourcesExhausted(self._told(), sorted(liars))

    async def _round(self, sources: Mapping[str, Source]) -> None:
        """Fetch what is missing. Raises `SourcesExhausted`."""
        loop = asyncio.get_running_loop()
        scheduler = core.PieceScheduler(self._wanted.size, self._piece, set(self._file.journal.now))
        events: asyncio.Queue[core.Event | Exception] = asyncio.Queue()
        tasks: dict[str, asyncio.Task[None]] = {}
        every: set[asyncio.Task[None]] = set()
        lanes: dict[str, Source] = {}
        per_source = 2 if 2 * len(sources) <= MOST_LANES else 1
        for number in range(per_source):
            for name, source in sources.items():
                if len(lanes) < max(MOST_LANES, len(sources)):
                    lanes[f"{name}#{number}"] = source
        waiting = list(lanes)
        busy = 0

        def joined() -> core.Joined:
            lane = waiting.pop(0)
            return core.Joined(lane, lanes[lane].name)

        def ended_lane(task: asyncio.Task[None]) -> None:
            every.discard(task)
            # Of this disk, or a bug: the round ends with it.
            if not task.cancelled() and isinstance(error := task.exception(), Exception):
                events.put_nowait(error)

        def perform(effects: Iterable[core.Effect]) -> bool:
            ended = False
            for effect in effects:
                match effect:
                    case core.Fetch(lane):
                        task = loop.create_task(self._lane(lanes[lane], effect, events), name=f"fetch {lane}")
                        tasks[lane] = task
                        every.add(task)
                        task.add_done_callback(ended_lane)
                    case core.Abandon(lane):
                        tasks[lane].cancel()
                    case core.Finished():
                        ended = True
                    case core.Starved():
                        raise SourcesExhausted(self._told())
            return ended

        try:
            ended = perform(scheduler.handle(core.Tick(), loop.time())) if not lanes else False
            while waiting and not ended:
                # At most MOST_LANES at once; the others wait as spares.
                if busy >= MOST_LANES:
                    break
                ended = perform(scheduler.handle(joined(), loop.time()))
                busy += 1
            told = 0.0
            while not ended:
                try:
                    async with asyncio.timeout(TICK_SECONDS):
                        event = await events.get()
                except TimeoutError:
                    event = core.Tick()
                if isinstance(event, Exception):
                    raise event
                if waiting and isinstance(event, core.Broke):
                    perform(scheduler.handle(joined(), loop.time()))
                ended = perform(scheduler.handle(event, loop.time()))
                if loop.time() - told >= TICK_SECONDS or ended:
                    told = loop.time()
                    # Also while bytes flow: the queue is never empty then, and a slow piece must be looked at all the same.
                    ended = ended or perform(scheduler.handle(core.Tick(), told))
                    self._tell("fetch", scheduler)
        finally:
            for task in every:
                task.cancel()
            if every:
                await asyncio.wait(every)
            # What is still being written belongs to this round: the next one may want that piece from somebody else.
            if self._saves:
                await asyncio.wait(self._saves)

    async def _lane(self, source: Source, fetch: core.Fetch, events: asyncio.Queue[core.Event | Exception]) -> None:
        """One range, into memory, then onto the disk."""
        loop = asyncio.get_running_loop()
        try:
            buffer = bytearray(fetch.stop - fetch.start)
            got = 0
            async with aclosing(source.read(fetch.start, fetch.stop)) as chunks:
                while True:
                    async with asyncio.timeout(self._idle_seconds):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    if got + len(chunk) > len(buffer):
                        raise SourceFailed("it sent more than it was asked for", final=True)
                    buffer[got : got + len(chunk)] = chunk
                    got += len(chunk)
                    self._came += len(chunk)
                    events.put_nowait(core.Arrived(fetch.source, fetch.piece, len(chunk)))
                    if wait := self._bandwidth.take(len(chunk), loop.time()):
                        await asyncio.sleep(wait)
            if got < len(buffer):
                raise SourceFailed("it ended in the middle of a piece")
            save = asyncio.ensure_future(
                asyncio.to_thread(self._file.save, fetch.piece, fetch.start, bytes(buffer), source.name)
            )
            self._saves.add(save)
            save.add_done_callback(self._saved)
            await asyncio.shield(save)
        except SourceFailed as error:
            self._reasons[source.name] = error.reason
            events.put_nowait(core.Broke(fetch.source, fetch.piece, error.final, error.pause))
        except TimeoutError:
            self._reasons[source.name] = f"it sent nothing for {self._idle_seconds:g} s"
            events.put_nowait(core.Broke(fetch.source, fetch.piece))
        else:
            events.put_nowait(core.Completed(fetch.source, fetch.piece))

    def _saved(self, save: asyncio.Future[None]) -> None:
        self._saves.discard(save)
        if not save.cancelled():
            save.exception()  # looked at, so that one whose lane was cancelled meanwhile is not reported as never retrieved

    def _tell(self, stage: str, scheduler: core.PieceScheduler) -> None:
        now = asyncio.get_running_loop().time()
        self._rates.append((now, self._came))
        while now - self._rates[0][0] > RATE_SECONDS:
            self._rates.popleft()
        began, came = self._rates[0]
        rate = (self._came - came) / (now - began) if now > began else 0.0
        titles = sorted({self._title(lane.rpartition("#")[0]) for lane in scheduler.active})
        self._report(Progress(stage, scheduler.bytes_done, self._wanted.size, rate, tuple(titles), self._note))

    def _told(self) -> dict[str, str]:
        return {self._title(name): self._reasons.get(name, "it gave nothing") for name in self._sources}

    def _title(self, name: str) -> str:
        source = self._sources.get(name)
        return name if source is None else source.title

    async def _verified(self) -> bool:
        self._report(Progress("verify", 0, self._wanted.size, note=self._note))
        stop = threading.Event()
        loop = asyncio.get_running_loop()
        told = 0.0

        def report(done: int) -> None:
            nonlocal told
            if (now := loop.time()) - told >= TICK_SECONDS:
                told = now
                progress = Progress("verify", done, self._wanted.size, note=self._note)
                with suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(self._report, progress)

        hashing = asyncio.ensure_future(asyncio.to_thread(self._file.matches, stop, report))
        try:
            return await asyncio.shield(hashing)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({hashing})
            raise
