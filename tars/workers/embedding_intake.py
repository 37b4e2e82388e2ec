"""The thread that reads calls: checks them, turns texts into rows ahead of the forward pass, and drops what nobody wants any more.

Law of this file: everything before the model; the forward pass and the answers of computed calls are the engine thread's. Calls take turns
by `CHUNK` texts, and by windows of a text that is read whole, so that a call of one text waits for no call of 2,000 and for no book; and
their first rows are computed while the rest is read.

A lone short text is read in the thread that brings it (`read_at_once`): waking another one costs more than its fraction of a millisecond.
One thread reads at a time; `_turn` is the lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import cast

from tars.errors import Cancelled, PromptTooLong, TarsError, WrongModelKind
from tars.messages.inference import EmbedParams, RerankParams, Tokenized, TokenizeParams
from tars.workers.embedding_pool import Call, Item, TextPool
from tars.workers.embedding_prompts import dimensions_for, prompt_for
from tars.workers.embedding_tokenizer import ResultT, Row, TextTokenizer
from tars.workers.engine import Emit, Submission
from tars.workers.inbox import Inbox, Taken

CHUNK = 64
"""Texts of one turn: under 40 ms of tokenizing for texts of 100 words (measured: 0.5 ms a text)."""


AT_ONCE_CHARACTERS = 2_000
"""The longest text, with the call's own prompt, that the caller's thread reads: about 500 tokens, 1 ms."""


class _Reading:
    """A call whose texts are being read."""

    def __init__(self, call: Call, prompt: str) -> None:
        self.call = call
        self.prompt = prompt
        self.at = 0
        self.held: list[Item] = []
        """Rows of a call that is refused if a later text turns out too long."""
        self.long: deque[tuple[int, Row, Generator[None, None, list[Row]]]] = deque()
        """Texts to be split: index, the cut row, and the reading of its pieces, a window a turn."""

    @property
    def number(self) -> int:
        """The call's."""
        return self.call.number


class _Tokenizing:
    """A call that wants a text's ids; the model never sees it."""

    def __init__(self, number: int, tokens: Generator[None, None, list[int]]) -> None:
        self.number = number
        self.tokens = tokens


class Intake:
    """`emit` ends the calls that never reach the model; `kind` is the model's."""

    def __init__(
        self,
        inbox: Inbox,
        pool: TextPool,
        tokenizer: TextTokenizer,
        emit: Emit,
        *,
        kind: str,
        dimensions: int,
        prompts: dict[str, str | None],
        default_prompt: str | None,
    ) -> None:
        self._inbox = inbox
        self._pool = pool
        self._tokenizer = tokenizer
        self._emit = emit
        self._kind = kind
        self._dimensions = dimensions
        self._prompts = prompts
        self._default_prompt = default_prompt
        self._reading: deque[_Reading | _Tokenizing] = deque()
        self._turn = threading.Lock()
        self.mark = 0
        """Grows with each turn."""
        self.prompt_tokens = 0

    def start(self) -> threading.Thread:
        """Run in a thread of its own, which ends when the inbox is closed."""
        thread = threading.Thread(target=self._main, name="tokenizer", daemon=True)
        thread.start()
        return thread

    def _main(self) -> None:
        try:
            while self.step():
                pass
            self._pool.close()
        except BaseException as error:  # noqa: BLE001  # a reader that died silently would let every call hang
            self._pool.fail(error)

    def step(self) -> bool:
        """Take what came and read one chunk; False at the end."""
        taken = self._inbox.take(wait=not self._reading)
        if taken.closed:
            return False
        with self._turn:
            self._take_turn(taken)
        return True

    def read_at_once(self, submission: Submission) -> bool:
        """Read a call of one short text here and now, where nothing else waits; False where the tokenizing thread should."""
        if not _is_short(submission) or not self._pool.is_empty() or not self._turn.acquire(blocking=False):
            return False
        try:
            if self._reading:
                return False
            self._take_turn(Taken([submission], set(), closed=False))
        except BaseException as error:  # noqa: BLE001  # as in the tokenizing thread
            self._pool.fail(error)
        finally:
            self._turn.release()
        return True

    def _take_turn(self, taken: Taken) -> None:
        self.mark += 1
        for submission in taken.submissions:
            self._guarded(submission.sequence, lambda submission=submission: self._admit(submission))  # type: ignore[misc]
        for number in taken.cancelled:
            given_up = [one for one in self._reading if isinstance(one, _Tokenizing) and one.number == number]
            for one in given_up:
                self._reading.remove(one)
            if self._pool.end(number) is not None or given_up:
                self._emit([(number, Cancelled("The call was cancelled."))])
        if self._reading:
            reading = self._reading.popleft()
            if isinstance(reading, _Tokenizing):
                self._guarded(reading.number, lambda: self._tokenize(reading))
            elif self._pool.is_open(reading.call):
                self._guarded(reading.number, lambda: self._read(reading))

    def _guarded(self, number: int, step: Callable[[], None]) -> None:
        try:
            step()
        except TarsError as error:
            self._pool.end(number)
            self._emit([(number, error)])

    def _admit(self, submission: Submission) -> None:
        work = submission.work
        if isinstance(work, TokenizeParams):
            reading = self._tokenizer.reading_tokens(work.text, special=work.add_special)
            self._tokenize(_Tokenizing(submission.sequence, reading))
            return
        if isinstance(work, EmbedParams) and self._kind == "embedding":
            dimensions = dimensions_for(work, self._dimensions)
            prompt = prompt_for(work, self._prompts, self._default_prompt)
        elif isinstance(work, RerankParams) and self._kind == "rerank":
            dimensions, prompt = 1, ""
        else:
            raise WrongModelKind(_wrong_kind(self._kind))
        call = Call(submission.sequence, work, submission.deadline, submission.received, dimensions)
        self._pool.open(call)
        self._reading.append(_Reading(call, prompt))

    def _tokenize(self, reading: _Tokenizing) -> None:
        """One window of the text, and the call to the end of the line; or its answer."""
        tokens = _turn(reading.tokens)
        if tokens is None:
            self._reading.append(reading)
        else:
            self._emit([(reading.number, Tokenized(tokens=tokens))])

    def _read(self, reading: _Reading) -> None:
        """One chunk of a call's texts into the pool, or one window of a text that is split, and the call to the end of the line."""
        if reading.long:
            self._read_on(reading)
        else:
            self._read_chunk(reading)
        if reading.long or reading.at < len(reading.call.texts):
            self._reading.append(reading)

    def _read_on(self, reading: _Reading) -> None:
        index, row, rows = reading.long[0]
        pieces = _turn(rows)
        if pieces is None:
            return
        reading.long.popleft()
        items = _split(reading.call, index, row, pieces)
        self._count(reading.call, items)
        self._pool.add(items)

    def _count(self, call: Call, items: list[Item]) -> None:
        tokens = sum(len(item.row) for item in items)
        call.tokens += tokens
        self.prompt_tokens += tokens

    def _read_chunk(self, reading: _Reading) -> None:
        call = reading.call
        first, texts = reading.at, call.texts[reading.at : reading.at + CHUNK]
        reading.at += len(texts)
        items = self._items(reading, first, texts)
        self._count(call, items)
        if not call.work.truncate:
            reading.held += items
            items = reading.held if reading.at >= len(call.texts) else []
            if items and call.truncated:
                raise self._too_long(call)
        self._pool.add(items)

    def _items(self, reading: _Reading, first: int, texts: object) -> list[Item]:
        call = reading.call
        assert isinstance(texts, list)
        if isinstance(call.work, RerankParams):
            rows = self._tokenizer.pairs(call.work.query, texts)
        else:
            rows = self._tokenizer.texts(reading.prompt, texts)
        items: list[Item] = []
        for index, (row, cut) in enumerate(rows, first):
            if cut and isinstance(call.work, EmbedParams) and call.work.overflow == "mean":
                rest = self._tokenizer.reading_pieces(reading.prompt, call.texts[index])
                pieces = _turn(rest)
                if pieces is None:
                    reading.long.append((index, row, rest))
                else:
                    items += _split(call, index, row, pieces)
                continue
            if cut:
                call.truncated.append(index)
            items.append(Item(call, index, row))
        return items

    def _too_long(self, call: Call) -> PromptTooLong:
        most = self._tokenizer.most
        what = "texts" if isinstance(call.work, EmbedParams) else "documents, with the query,"
        return PromptTooLong(
            f"{len(call.truncated)} of the {what} have more than this model's {most} tokens (the first is number "
            f"{call.truncated[0]}). Split them, or send truncate: true.",
            details={"context": most, "prompt_tokens": most + 1, "texts": call.truncated},
        )


def _is_short(submission: Submission) -> bool:
    work = submission.work
    # A text that is split may take several turns.
    if not isinstance(work, EmbedParams) or work.overflow == "mean":
        return False
    texts = [work.input] if isinstance(work.input, str) else work.input
    return len(texts) == 1 and len(texts[0]) + len(work.prompt or "") <= AT_ONCE_CHARACTERS


def _split(call: Call, index: int, row: Row, pieces: list[Row]) -> list[Item]:
    """A text's pieces, to be averaged; the cut row where there is only one (its prompt fills the model)."""
    if len(pieces) < 2:
        call.truncated.append(index)
        return [Item(call, index, row)]
    call.split_text(index, [piece.content for piece in pieces])
    return [Item(call, index, piece, place) for place, piece in enumerate(pieces)]


def _turn(reading: Generator[None, None, ResultT]) -> ResultT | None:
    """One window further; the result at the end, None before."""
    try:
        next(reading)
    except StopIteration as end:
        return cast("ResultT", end.value)
    return None


def _wrong_kind(kind: str) -> str:
    if kind == "embedding":
        return "This is an embedding model; it does not chat or rerank. Ask a chat model, or a reranker."
    return "This is a reranker; it does not embed or chat. Ask an embedding model, or a chat model."
