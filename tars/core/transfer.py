"""Which piece of a file is asked of which source, when several have it; how fast bytes may pass; where a file's pieces lie.

Law of this file: events in, effects out, `now` in seconds of any monotonic clock. It moves no byte: `mesh.file_transfer` does. A source is
a name; one that is asked for several pieces at once joins under several names (lanes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from tars.core.types import Bytes

PIECE = Bytes(16 * 2**20)
"""Small enough that what a dying peer takes with it is nothing (0.13 s of a gigabit line) and that a few fit into memory; large enough that
a request's way there and back (1 ms on a LAN, 30 ms on a tailnet) costs little."""
STRIKES = 3
"""A source that broke so often with no piece in between is given up."""
FIRST_PAUSE = 0.5
"""Seconds before a source that broke is asked again; twice as long each time."""
PATIENCE = 600.0
"""Seconds that a source may say "busy" and give nothing: others wait in its line too, but not for ever."""
STEAL_GAIN = 0.7
"""An idle source takes over another's piece if it expects to be done in this share of the time that one still needs: below 1, because
rates are guesses and the bytes that already came are thrown away."""
SILENT_SECONDS = 2.0
"""A source that has sent nothing for so long is doubted, where nothing else tells what is usual: a request takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A source is there, idle. `of`: whose lane it is, where one is asked for several pieces at once."""

    source: str
    of: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """`count` more bytes of the piece that `source` is fetching."""

    source: str
    piece: int
    count: int


@dataclass(frozen=True, slots=True)
class Completed:
    """`source` brought the whole piece, and it is saved."""

    source: str
    piece: int


@dataclass(frozen=True, slots=True)
class Broke:
    """`source` did not bring its piece. `final`: it never will (it has not the file, or lies about it)."""

    source: str
    piece: int
    final: bool = False
    pause: float | None = None
    """Seconds after which it wants to be asked again (it is busy): no strike."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: pauses may be over, a slow piece may be worth taking over."""


Event = Joined | Arrived | Completed | Broke | Tick


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask `source` for the bytes from `start` up to, not including, `stop`."""

    source: str
    piece: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop what `source` is fetching: another brought that piece. It is idle, and gets its next one with the same effects."""

    source: str
    piece: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Every piece is there."""


@dataclass(frozen=True, slots=True)
class Starved:
    """Pieces are missing and no source is left."""


Effect = Fetch | Abandon | Finished | Starved


@dataclass(slots=True)
class _Source:
    of: str
    piece: int | None = None
    since: float = 0.0
    got: int = 0
    """Bytes of the piece under way."""
    rate: float | None = None
    """Bytes a second, over its last pieces; None before the first."""
    strikes: int = 0
    not_before: float = 0.0
    busy_since: float | None = None
    gone: bool = False


@dataclass(slots=True)
class PieceScheduler:
    """One file's pieces. Pieces are handed out in order; at the end idle sources take over what the slow ones still have."""

    size: int
    piece: int = PIECE
    done: set[int] = field(default_factory=set)
    _sources: dict[str, _Source] = field(default_factory=dict)
    _missing: list[int] = field(default_factory=list)
    _ended: bool = False

    def __post_init__(self) -> None:
        if self.size < 0 or self.piece < 1:
            raise ValueError("a file's size is at least 0, a piece's at least 1")
        self.done = {each for each in self.done if 0 <= each < self.pieces}
        # Taken from the end.
        self._missing = [each for each in range(self.pieces - 1, -1, -1) if each not in self.done]

    @property
    def pieces(self) -> int:
        """How many there are; the last one may be shorter."""
        return -(-self.size // self.piece)

    @property
    def bytes_done(self) -> int:
        """Bytes of whole pieces and of those under way."""
        return min(self.size, self._saved() + self._under_way())

    @property
    def active(self) -> tuple[str, ...]:
        """Sources that are fetching now."""
        return tuple(name for name, source in self._sources.items() if source.piece is not None)

    def span(self, piece: int) -> tuple[int, int]:
        """A piece's first byte and the one after its last."""
        return piece * self.piece, min(self.size, (piece + 1) * self.piece)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What follows from `event`. After `Finished` or `Starved` nothing follows any more."""
        if self._ended:
            return []
        effects: list[Effect] = []
        match event:
            case Joined(name, of):
                self._sources.setdefault(name, _Source(of or name))
            case Arrived(name, piece, count):
                if (source := self._sources.get(name)) is not None and source.piece == piece:
                    source.got += count
                return []
            case Completed(name, piece):
                effects += self._complete(name, piece, now)
            case Broke():
                self._broke(event, now)
            case Tick():
                pass
        if len(self.done) == self.pieces:
            self._ended = True
            return [*effects, Finished()]
        effects += self._assign(now)
        if all(source.gone for source in self._sources.values()):
            self._ended = True
            effects.append(Starved())
        return effects

    # --- inside -------------------------------------------------------------------------------------------------------

    def _saved(self) -> int:
        last = self.pieces - 1
        short = self.pieces * self.piece - self.size
        return len(self.done) * self.piece - (short if last in self.done else 0)

    def _under_way(self) -> int:
        most: dict[int, int] = {}
        for source in self._sources.values():
            if source.piece is not None:
                most[source.piece] = max(most.get(source.piece, 0), source.got)
        return sum(most.values())

    def _complete(self, name: str, piece: int, now: float) -> list[Effect]:
        effects: list[Effect] = []
        source = self._sources.get(name)
        if source is not None and source.piece == piece:
            start, stop = self.span(piece)
            fresh = (stop - start) / max(1e-6, now - source.since)
            source.rate = fresh if source.rate is None else (source.rate + fresh) / 2
            source.piece, source.got, source.strikes, source.busy_since = None, 0, 0, None
        self.done.add(piece)
        if piece in self._missing:
            self._missing.remove(piece)
        for other_name, other in self._sources.items():
            if other.piece == piece:
                other.piece, other.got = None, 0
                effects.append(Abandon(other_name, piece))
        return effects

    def _broke(self, event: Broke, now: float) -> None:
        source = self._sources.get(event.source)
        if source is None or (source.piece != event.piece and not event.final):
            return  # about a piece that it was told to leave meanwhile
        piece, source.piece, source.got = source.piece, None, 0
        if piece is not None and piece not in self.done and not any(s.piece == piece for s in self._sources.values()):
            self._missing.append(piece)
            self._missing.sort(reverse=True)
        if event.final:
            source.gone = True
        elif event.pause is not None:
            source.busy_since = now if source.busy_since is None else source.busy_since
            source.gone = now - source.busy_since > PATIENCE
            source.not_before = now + event.pause
        else:
            source.strikes += 1
            source.gone = source.strikes >= STRIKES
            source.not_before = now + FIRST_PAUSE * 2 ** (source.strikes - 1)

    def _assign(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        idle = [
            (name, source)
            for name, source in self._sources.items()
            if source.piece is None and not source.gone and source.not_before <= now
        ]
        # The quickest first: the last pieces go to those that end them soonest.
        for name, source in sorted(idle, key=lambda each: -(each[1].rate or 0.0)):
            piece = self._missing.pop() if self._missing else self._worth_taking(source, now)
            if piece is None:
                continue
            source.piece, source.since, source.got = piece, now, 0
            effects.append(Fetch(name, piece, *self.span(piece)))
        return effects

    def _worth_taking(self, mine: _Source, now: float) -> int | None:
        """The piece whose end is furthest away of those that this source would bring clearly sooner. Two at most fetch the same piece, not
        counting those that are silent.
        """
        held: dict[int, list[_Source]] = {}
        for source in self._sources.values():
            if source.piece is not None:
                held.setdefault(source.piece, []).append(source)
        rates = [source.rate for source in self._sources.values() if source.rate is not None]
        # A newcomer is taken for as quick as the quickest, so that it gets its chance.
        my_rate = mine.rate if mine.rate is not None else max(rates, default=None)
        best: tuple[float, int] | None = None
        for piece, holders in held.items():
            if any(holder.of == mine.of for holder in holders):
                continue  # its own other lane: the same line, the same disk
            size = self.span(piece)[1] - self.span(piece)[0]
            talking = [holder for holder in holders if holder.got or now - holder.since < SILENT_SECONDS]
            if not talking:
                left = math.inf
            elif len(talking) > 1:
                continue
            else:
                left = _seconds_left(talking[0], size, now)
                if left <= (2 * SILENT_SECONDS if my_rate is None else size / my_rate / STEAL_GAIN):
                    continue
            if best is None or left > best[0]:
                best = (left, piece)
        return None if best is None else best[1]


def _seconds_left(holder: _Source, size: int, now: float) -> float:
    """How long a source will still need for its piece: what it does on this one counts, and at first what it did before."""
    elapsed = now - holder.since
    rate = holder.got / elapsed if holder.got and elapsed > 0 else 0.0
    if elapsed < SILENT_SECONDS:
        rate = max(rate, holder.rate or 0.0)
        if not rate:
            return 0.0  # it has only begun
    return (size - holder.got) / rate if rate else math.inf


@dataclass(slots=True)
class TokenBucket:
    """A bandwidth cap: `rate` bytes a second, of which at most `burst` bytes pass at once. None lets everything pass."""

    rate: float | None
    burst: float = 2**20
    passed: int = 0
    """Bytes in all."""
    _level: float = 0.0
    _at: float | None = None

    def take(self, count: int, now: float) -> float:
        """Seconds to wait before `count` bytes pass; they are taken at once, so that waiting callers share the rate."""
        self.passed += count
        if self.rate is None:
            return 0.0
        if self._at is None:
            self._level, self._at = self.burst, now
        self._level = min(self.burst, self._level + max(0.0, now - self._at) * self.rate)
        self._at = max(self._at, now)
        self._level -= count
        return max(0.0, -self._level / self.rate)


def liars(claims: Iterable[tuple[str, int, str]], truth: dict[int, str]) -> tuple[str, ...]:
    """Sources whose (source, piece, digest) differs from the digest of the verified file's piece, sorted."""
    return tuple(sorted({source for source, piece, digest in claims if truth.get(piece, digest) != digest}))
