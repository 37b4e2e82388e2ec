"""The texts of all callers that wait for the model, and what became of each call.

Law of this file: one lock, no model, no tokenizer, no clock. The tokenizing thread adds, the engine thread takes; whoever ends a call first
is told so, and only that one answers it.

Callers take turns: each batch begins with the text that waits longest of the call that was served longest ago, so that one with 2,000
texts holds up nobody with one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from tars.messages.inference import EmbedParams, RerankParams
from tars.workers.embedding_tokenizer import Row
from tars.workers.embedding_vectors import Vector, mean_of_pieces

WINDOW = 512
"""Texts that are looked at for one batch: enough to fill it with like lengths, cheap to sort."""


class Call:
    """One call: which of its texts are done. Touched by one thread at a time: the pool's lock hands its items over."""

    def __init__(
        self,
        number: int,
        work: EmbedParams | RerankParams,
        deadline: float | None,
        received: float,
        dimensions: int = 0,
    ) -> None:
        self.number = number
        self.work = work
        self.deadline = deadline
        self.received = received
        self.started: float | None = None
        self.dimensions = dimensions
        """What each vector will have."""
        if isinstance(work, RerankParams):
            self.texts: Sequence[str] = work.documents
        else:
            self.texts = [work.input] if isinstance(work.input, str) else work.input
        self.left = len(self.texts)
        """Texts without an answer."""
        self.results: list[str | float | None] = [None] * len(self.texts)
        self.truncated: list[int] = []
        self.split: list[int] = []
        self.tokens = 0
        self._pieces: dict[int, tuple[list[int], list[Vector | None]]] = {}

    def split_text(self, index: int, weights: list[int]) -> None:
        """That text comes in so many pieces, with so many tokens each."""
        self.split.append(index)
        self._pieces[index] = (weights, [None] * len(weights))

    def vector_of(self, index: int, piece: int, vector: Vector) -> Vector | None:
        """The text's vector; None while pieces of it are missing."""
        if index not in self._pieces:
            return vector
        weights, vectors = self._pieces[index]
        vectors[piece] = vector
        found = [one for one in vectors if one is not None]
        if len(found) < len(vectors):
            return None
        del self._pieces[index]
        return mean_of_pieces(found, weights)


class Item:
    """One row in the pool: a text, a pair, or a piece of a text."""

    __slots__ = ("call", "index", "piece", "row")

    def __init__(self, call: Call, index: int, row: Row, piece: int = 0) -> None:
        self.call = call
        self.index = index
        self.row = row
        self.piece = piece


class TextPool:
    """See the module's law."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: dict[int, Call] = {}
        self._waiting: OrderedDict[int, deque[Item]] = OrderedDict()
        self._closed = False
        self._failure: BaseException | None = None
        self._computing = 0

    # --- calls ---

    def open(self, call: Call) -> None:
        """Know the call from now on."""
        with self._condition:
            self._calls[call.number] = call

    def end(self, number: int) -> Call | None:
        """Forget the call and its waiting texts. The call, if nobody ended it before: then the one who asked answers it."""
        with self._condition:
            self._waiting.pop(number, None)
            return self._calls.pop(number, None)

    def is_open(self, call: Call) -> bool:
        """Whether anybody still waits for the call."""
        with self._condition:
            return self._calls.get(call.number) is call

    def is_empty(self) -> bool:
        """Whether there is no call at all: nothing waits, nothing is being computed."""
        with self._condition:
            return not self._calls

    def expired(self, now: float) -> list[int]:
        """Numbers of the calls whose deadline is over."""
        with self._condition:
            return [n for n, call in self._calls.items() if call.deadline is not None and now >= call.deadline]

    # --- items ---

    def add(self, items: Sequence[Item]) -> None:
        """Rows of open calls; those of ended ones vanish."""
        with self._condition:
            for item in items:
                if self._calls.get(item.call.number) is item.call:
                    self._waiting.setdefault(item.call.number, deque()).append(item)
            self._condition.notify_all()

    def put_back(self, items: Sequence[Item]) -> None:
        """A batch that could not be computed waits again, before everything else."""
        with self._condition:
            self._computing = 0
            for item in reversed(items):
                number = item.call.number
                if self._calls.get(number) is item.call:
                    self._waiting.setdefault(number, deque()).appendleft(item)
                    self._waiting.move_to_end(number, last=False)

    def wait(self) -> bool:
        """Until there is a row or the end; False at the end. Raises what `fail` was given."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._closed)
            if self._failure is not None:
                raise self._failure
            return not self._closed

    def take(self, select: Callable[[Sequence[int]], Sequence[int]]) -> list[Item]:
        """The next batch: `select` gets the lengths of what waits, in the order of turns, and says which; the first should be among them.

        Empty where nothing waits (any more).
        """
        with self._condition:
            window = self._window()
            if not window:
                return []
            batch = [window[index] for index in select([len(item.row) for item in window])]
            chosen = set(map(id, batch))
            for number in dict.fromkeys(item.call.number for item in batch):
                rest = deque(item for item in self._waiting[number] if id(item) not in chosen)
                del self._waiting[number]
                if rest:
                    self._waiting[number] = rest  # at the end: the others come first now
            self._computing = len(batch)
            return batch

    def _window(self) -> list[Item]:
        """Up to `WINDOW` rows: the first of each call, then the second of each, and so on."""
        window: list[Item] = []
        lines = [iter(line) for line in self._waiting.values()]
        while lines and len(window) < WINDOW:
            going = []
            for line in lines:
                item = next(line, None)
                if item is not None:
                    window.append(item)
                    going.append(line)
            lines = going
        return window[:WINDOW]

    # --- the end, and counts ---

    def close(self) -> None:
        """`wait` returns False from now on."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """The tokenizing thread met what it must not survive: the engine thread raises it."""
        with self._condition:
            self._failure, self._closed = error, True
            self._condition.notify_all()

    def done(self) -> None:
        """The batch that was taken is computed."""
        with self._condition:
            self._computing = 0

    def counts(self) -> tuple[int, int]:
        """(texts being computed, texts waiting) now."""
        with self._condition:
            left = sum(call.left for call in self._calls.values())
            return self._computing, max(0, left - self._computing)
