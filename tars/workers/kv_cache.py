"""Which tokens' keys and values lie where in the KV cache, and what a new prompt takes over of them.

Law of this file: pure bookkeeping; llama.cpp is not known here. A decision comes back as `Copy` and `Trim`, which the engine performs on
llama.cpp's memory in that order.

A stream is one sequence id of llama.cpp. Streams of ended sequences keep their tokens until somebody needs the place (least recently used
first), so that a prompt that begins like a recent or a running one computes only what is new. Cells are counted one by one, with their
owners: in a cache that the streams share, a copied beginning costs no new cell.

Where every stream has cells of its own, llama.cpp computes only neighbours together, and every gap between running ones costs a pass over
the weights in each step, more than a copy of a stream costs once. So new sequences go beside the running ones, and `close_up` fills gaps;
what lay there moves to where nothing or something older lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

WORTH_COPYING = 16
"""Shared tokens below which a beginning is computed again: a copy between split streams moves the whole stream."""


LEFT = 2
"""Tokens of a prompt that are computed in any case: the last one's logits are needed, and a single token of a prompt would go through
other kernels than two do (measured on a CPU: bitwise another result)."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Give `target` (empty) the first `length` tokens of `source`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Drop a stream's tokens from position `length` on."""

    stream: int
    length: int


Action = Copy | Trim


@dataclass(frozen=True, slots=True)
class Place:
    """Where a new sequence goes, and how many of its prompt's tokens are there already once `actions` are done."""

    stream: int
    kept: int
    actions: tuple[Action, ...]


@dataclass(slots=True)
class _Stream:
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    adapter: str = ""
    """The LoRA adapter that computed them; another one's cells are worth nothing."""
    taken: bool = False
    used_at: int = 0
    whole_chunks: int = 0
    """So many of the first tokens were computed as prompt, in whole chunks from 0 on: what an exact engine may reuse."""


class KvCache:
    """The cells of one context.

    `cells`: how many there are in all. `shared`: one pool for all streams (llama.cpp's unified cache), else each stream has
    `cells // streams` of its own. `partial`: False for models (recurrent, hybrid) that can only keep or forget a sequence whole.
    `chunk`: in an exact engine the length of the prefill chunks on whose borders alone a beginning is taken over; 0 elsewhere.
    """

    def __init__(self, streams: int, cells: int, *, shared: bool, partial: bool = True, chunk: int = 0) -> None:
        if streams < 1 or cells < streams:
            raise ValueError(f"a cache needs a stream and a cell for each, not {streams} and {cells}")
        self._streams = [_Stream() for _ in range(streams)]
        self._cells = cells
        self._shared = shared
        self._partial = partial
        self._chunk = chunk
        self._owners: dict[int, int] = {}
        """Cell -> how many streams have it."""
        self._next_cell = 0
        self._clock = 0

    # --- what can be read ---

    @property
    def cells(self) -> int:
        """How many tokens it holds at most."""
        return self._cells

    @property
    def free(self) -> int:
        """Cells that nobody has. In split streams a stream cannot use another one's."""
        return self._cells - len(self._owners)

    @property
    def used(self) -> int:
        """Cells of running sequences, each counted once."""
        return len(self._running())

    @property
    def cached(self) -> int:
        """Cells that only ended sequences have: what can be freed at once."""
        return len(self._owners) - self.used

    def streams_free(self) -> int:
        """Streams that no running sequence has."""
        return sum(not stream.taken for stream in self._streams)

    def length(self, stream: int) -> int:
        """How many tokens lie there."""
        return len(self._streams[stream].tokens)

    # --- the life of a sequence ---

    def take(self, prompt: Sequence[int], adapter: str = "", *, aside: bool = True) -> Place | None:
        """A stream for a new sequence, with the longest beginning of its prompt that lies anywhere; None while every stream is taken.

        The prompt's last tokens are never taken over: their logits are what generation starts from. `aside`: what lies in the stream may be
        copied elsewhere; not where saved cells are written into it at once, for llama.cpp copies with its next decode.
        """
        free = [number for number, stream in enumerate(self._streams) if not stream.taken]
        if not free:
            return None
        self._clock += 1
        source, kept = self._longest(prompt, adapter, free)
        aside = aside and self._neighbours_count
        goes_on = source is not None and source in free and self._continue_in_place(source, kept, free)
        target = min(free, key=lambda number: self._cost(number, source, goes_on))
        if target == source:
            actions = self._set_aside(target) if aside and not goes_on else ()
            if self.length(target) > kept:
                actions = (*actions, Trim(target, kept))
            self._cut(target, kept)
        else:
            if kept < WORTH_COPYING and not self._shared:
                kept = 0
            actions = self._set_aside(target, source) if aside else ()
            if self._streams[target].tokens:
                actions = (*actions, Trim(target, 0))
            self._cut(target, 0)
            if kept and source is not None:
                actions = (*actions, Copy(source, target, kept))
                self._share(source, target, kept)
        stream = self._streams[target]
        stream.taken, stream.adapter, stream.used_at = True, adapter, self._clock
        return Place(target, kept, actions)

    def close_up(self) -> tuple[int, int, tuple[Action, ...]] | None:
        """Let the running sequence at an end move into a gap between running ones: from where, to where, and what to do; None
        where there is no gap, or it would not help.
        """
        taken = [number for number, stream in enumerate(self._streams) if stream.taken]
        if not self._neighbours_count or len(taken) < 2 or taken[-1] - taken[0] + 1 == len(taken):
            return None
        gaps = [number for number in range(taken[0], taken[-1]) if not self._streams[number].taken]
        # The end whose loss shortens the span more: a lone one far out before one of a block.
        last = taken[-1] - taken[-2] >= taken[1] - taken[0]
        mover, gap = (taken[-1], gaps[0]) if last else (taken[0], gaps[-1])
        actions = self._set_aside(gap)
        if self._streams[gap].tokens:
            actions = (*actions, Trim(gap, 0))
        self._cut(gap, 0)
        actions = (*actions, Copy(mover, gap, self.length(mover)), Trim(mover, 0))
        self._streams[gap], self._streams[mover] = self._streams[mover], self._streams[gap]
        return mover, gap, actions

    def beginning(self, prompt: Sequence[int], adapter: str = "") -> int:
        """How many of a prompt's tokens `take` would find now."""
        return self._longest(prompt, adapter, range(len(self._streams)))[1]

    def lacking(self, prompt: Sequence[int], adapter: str = "") -> int:
        """Cells that a new sequence of these tokens takes of those that are free or cached: all but what it shares with running ones.

        Its beginning in an ended sequence lies in cells that count as cached, and are not to be had twice.
        """
        free = [number for number, stream in enumerate(self._streams) if not stream.taken]
        source, kept = self._longest(prompt, adapter, free)
        if source is None:
            return len(prompt)
        running = self._running()
        return len(prompt) - sum(cell in running for cell in self._streams[source].cells[:kept])

    def append(self, stream: int, tokens: Sequence[int], *, chunked: bool = False) -> None:
        """Note tokens that were computed at the end of a stream. `chunked`: they end a whole chunk of its prompt."""
        one = self._streams[stream]
        for token in tokens:
            one.tokens.append(token)
            one.cells.append(self._next_cell)
            self._owners[self._next_cell] = 1
            self._next_cell += 1
        if chunked:
            one.whole_chunks = len(one.tokens)

    def restore(self, stream: int, tokens: Sequence[int], whole_chunks: int = 0) -> None:
        """Note a sequence whose saved state was put into an (empty) stream."""
        self.append(stream, tokens)
        self._streams[stream].whole_chunks = whole_chunks

    def release(self, stream: int, *, keep: bool = True) -> tuple[Action, ...]:
        """A sequence ended. `keep`: its tokens stay for prompts that begin alike, until the place is needed."""
        one = self._streams[stream]
        one.taken = False
        self._clock += 1
        one.used_at = self._clock
        if keep or not one.tokens:
            return ()
        self._cut(stream, 0)
        return (Trim(stream, 0),)

    def forget(self, stream: int) -> None:
        """The engine had to drop everything of a running stream."""
        self._cut(stream, 0)

    def room_for(self, count: int) -> tuple[Action, ...] | None:
        """What to drop of ended sequences so that `count` cells are free; None where that is not enough. Split streams always have room."""
        if not self._shared or self.free >= count:
            return ()
        if self.free + self.cached < count:
            return None
        actions: list[Action] = []
        idle = [number for number, stream in enumerate(self._streams) if not stream.taken and stream.tokens]
        for number in sorted(idle, key=lambda number: self._streams[number].used_at):
            if self.free >= count:
                break
            self._cut(number, 0)
            actions.append(Trim(number, 0))
        return tuple(actions)

    def drop_oldest(self) -> tuple[Action, ...]:
        """Drop the ended sequence that was used least recently; nothing where none is left."""
        idle = [number for number, stream in enumerate(self._streams) if not stream.taken and stream.tokens]
        if not idle:
            return ()
        oldest = min(idle, key=lambda number: self._streams[number].used_at)
        self._cut(oldest, 0)
        return (Trim(oldest, 0),)

    # --- inside ---

    def _running(self) -> set[int]:
        """Cells of running sequences. While a call waits for cells this is looked at in every step: so without a loop in Python."""
        return set[int]().union(*(stream.cells for stream in self._streams if stream.taken))

    def _longest(self, prompt: Sequence[int], adapter: str, free: Sequence[int]) -> tuple[int | None, int]:
        """The stream with the longest usable beginning of `prompt`, and its length; a free one where two are equal."""
        best: tuple[int, bool, int] = (0, False, 0)
        found: int | None = None
        for number, stream in enumerate(self._streams):
            if not stream.tokens or stream.adapter != adapter:
                continue
            length = common_beginning(stream.tokens, prompt, len(prompt) - LEFT)
            if self._chunk:
                length = min(length, stream.whole_chunks) // self._chunk * self._chunk
            if not self._partial and length < len(stream.tokens):
                continue
            key = (length, number in free, stream.used_at)
            if length and key > best:
                best, found = key, number
        return found, best[0]

    def _continue_in_place(self, source: int, kept: int, free: Sequence[int]) -> bool:
        """Whether the found stream itself goes on, which costs its tokens after the beginning; else they are copied and stay."""
        lost = self.length(source) - kept
        if not lost or len(free) == 1:
            return True
        empty = any(not self._streams[number].tokens for number in free)
        return kept >= WORTH_COPYING and lost <= kept and not empty

    def _cost(self, number: int, source: int | None, goes_on: bool) -> tuple[int, bool, bool, bool, int]:
        """What taking a free stream costs: gaps between running ones; then the found one is best where it `goes_on`, else, as the source
        of a copy, worst; empty ones are better than used ones, and these the longer ago they were used.
        """
        stream = self._streams[number]
        blocks = 0
        if self._neighbours_count:
            taken = [each.taken or place == number for place, each in enumerate(self._streams)]
            blocks = sum(here and not before for before, here in zip([False, *taken], taken, strict=False))
        return (
            blocks,
            not (goes_on and number == source),
            number == source,
            bool(stream.tokens),
            stream.used_at,
        )

    @property
    def _neighbours_count(self) -> bool:
        """Whether it matters where sequences lie, and they can be moved."""
        return not self._shared and self._partial

    def _set_aside(self, number: int, source: int | None = None) -> tuple[Action, ...]:
        """Copy what lies in a free stream to where nothing lies, or something older; nothing where it is not worth that. `source` stays."""
        one = self._streams[number]
        if len(one.tokens) < WORTH_COPYING:
            return ()
        others = [
            other
            for other, stream in enumerate(self._streams)
            if not stream.taken
            and other not in (number, source)
            and (not stream.tokens or stream.used_at < one.used_at)
        ]
        if not others:
            return ()
        place = min(others, key=lambda other: (bool(self._streams[other].tokens), self._streams[other].used_at))
        actions: tuple[Action, ...] = (Trim(place, 0),) if self._streams[place].tokens else ()
        self._cut(place, 0)
        self._share(number, place, len(one.tokens))
        aside = self._streams[place]
        aside.adapter, aside.used_at = one.adapter, one.used_at
        return (*actions, Copy(number, place, len(one.tokens)))

    def _share(self, source: int, target: int, length: int) -> None:
        taken_over, stream = self._streams[source], self._streams[target]
        stream.tokens = taken_over.tokens[:length]
        stream.whole_chunks = min(taken_over.whole_chunks, length)
        if self._shared:
            stream.cells = taken_over.cells[:length]
            for cell in stream.cells:
                self._owners[cell] += 1
        else:
            stream.cells = list(range(self._next_cell, self._next_cell + length))
            self._owners.update(dict.fromkeys(stream.cells, 1))
            self._next_cell += length

    def _cut(self, number: int, length: int) -> None:
        stream = self._streams[number]
        for cell in stream.cells[length:]:
            if self._owners[cell] == 1:
                del self._owners[cell]
            else:
                self._owners[cell] -= 1
        del stream.tokens[length:], stream.cells[length:]
        stream.whole_chunks = min(stream.whole_chunks, length)


def common_beginning(ours: Sequence[int], theirs: Sequence[int], most: int) -> int:
    """How many first tokens are the same, at most `most`."""
    count = max(0, min(len(ours), len(theirs), most))
    # Whole lists first: comparing slices is C, and prompts that share anything mostly share all of it.
    if ours[:count] == theirs[:count]:
        return count
    for index in range(count):
        if ours[index] != theirs[index]:
            return index
    return count
