"""The thread that reads calls: checks them, turns texts into rows ahead of the forward pass, and drops what nobody wants any more.

Law of this file: everything before the model; the forward pass and the answers of computed calls are the engine thread's. Calls take turns
by `CHUNK` texts, so that a call of one text waits for no call of 2,000; and their first rows are computed while the rest is read.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from tars.errors import Cancelled, PromptTooLong, TarsError, WrongModelKind
from tars.messages.inference import EmbedParams, RerankParams, Tokenized, TokenizeParams
from tars.workers.embedding_pool import Call, Item, TextPool
from tars.workers.embedding_prompts import dimensions_for, prompt_for
from tars.workers.embedding_tokenizer import TextTokenizer
from tars.workers.engine import Emit, Submission
from tars.workers.inbox import Inbox

CHUNK = 64
"""Texts of one turn: under 40 ms of tokenizing for texts of 100 words (measured: 0.5 ms a text)."""


class _Reading:
    """A call whose texts are being read."""

    def __init__(self, call: Call, prompt: str) -> None:
        self.call = call
        self.prompt = prompt
        self.at = 0
        self.held: list[Item] = []
        """Rows of a call that is refused if a later text turns out too long."""


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
        self._reading: deque[_Reading] = deque()
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
        self.mark += 1
        for submission in taken.submissions:
            self._guarded(submission.sequence, lambda submission=submission: self._admit(submission))  # type: ignore[misc]
        for number in taken.cancelled:
            if self._pool.end(number) is not None:
                self._emit([(number, Cancelled("The call was cancelled."))])
        if self._reading:
            reading = self._reading.popleft()
            if self._pool.is_open(reading.call):
                self._guarded(reading.call.number, lambda: self._read(reading))
        return True

    def _guarded(self, number: int, step: Callable[[], None]) -> None:
        try:
            step()
        except TarsError as error:
            self._pool.end(number)
            self._emit([(number, error)])

    def _admit(self, submission: Submission) -> None:
        work = submission.work
        if isinstance(work, TokenizeParams):
            tokens = self._tokenizer.tokens(work.text, special=work.add_special)
            self._emit([(submission.sequence, Tokenized(tokens=tokens))])
            return
        if isinstance(work, EmbedParams) and self._kind == "embedding":
            dimensions = dimensions_for(work, self._dimensions)
            prompt = prompt_for(work, self._prompts, self._default_prompt)
        elif isinstance(work, RerankParams) and self._kind == "rerank":
            dimensions, prompt = 1, ""
        else:
            raise WrongModelKind(_wrong_kind(self._kind))
        call = Call(submission.sequence, work, submission.deadline, time.monotonic(), dimensions)
        self._pool.open(call)
        self._reading.append(_Reading(call, prompt))

    def _read(self, reading: _Reading) -> None:
        """One chunk of a call's texts into the pool, and the call to the end of the line."""
        call = reading.call
        first, texts = reading.at, call.texts[reading.at : reading.at + CHUNK]
        reading.at += len(texts)
        items = self._items(reading, first, texts)
        tokens = sum(len(item.row) for item in items)
        call.tokens += tokens
        self.prompt_tokens += tokens
        if not call.work.truncate:
            reading.held += items
            items = reading.held if reading.at >= len(call.texts) else []
            if items and call.truncated:
                raise self._too_long(call)
        self._pool.add(items)
        if reading.at < len(call.texts):
            self._reading.append(reading)

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
                pieces = self._tokenizer.pieces(reading.prompt, call.texts[index])
                if len(pieces) > 1:
                    call.split_text(index, [piece.content for piece in pieces])
                    items += [Item(call, index, piece, place) for place, piece in enumerate(pieces)]
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


def _wrong_kind(kind: str) -> str:
    if kind == "embedding":
        return "This is an embedding model; it does not chat or rerank. Ask a chat model, or a reranker."
    return "This is a reranker; it does not embed or chat. Ask an embedding model, or a chat model."
