"""Texts and pairs to rows of token ids, by the fast tokenizer.

Law of this file: ids out of text; no torch, no calls, no queue. One thread at a time: the limit of length is a state of the tokenizer.

It runs in a thread, not in a process of its own: the Rust code releases the GIL, so it overlaps the forward pass either way, and a process
would pickle every text and every id once more.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

CHARACTERS_PER_TOKEN = 64
"""A text is first cut to this many characters per allowed token: where the cut text is too long already, the rest need not be read."""

ResultT = TypeVar("ResultT")

WINDOW_CHARACTERS = 16_384
"""A text that is read whole is read in windows of so many, and others have a turn between two: a text of 4 MB took 15 s in one piece, 3 s
in windows (measured: the tokenizer's time for a token grows with the text), and nobody else's call was read in that time."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text as the model reads it, special tokens included."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    skip: int = 0
    """First so many tokens do not count in the average: a prompt, in models that say so."""
    content: int = 0
    """Tokens of the text itself: what a piece weighs."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])


def clean(text: str) -> str:
    """Half of a surrogate pair becomes a question mark: the tokenizer takes UTF-8 only."""
    return text.encode("utf-8", "replace").decode("utf-8")


def finished(reading: Generator[None, None, ResultT]) -> ResultT:
    """What a reading ends with, without turns."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return cast("ResultT", end.value)


class TextTokenizer:
    """`backend` is a `tokenizers.Tokenizer`; `most` the model's tokens of one row, special ones included."""

    def __init__(self, backend: Any, most: int, pad_id: int, *, skip_prompt: bool = False) -> None:
        self.most = most
        self._backend = backend
        self._pad_id = pad_id
        self._skip_prompt = skip_prompt
        backend.no_padding()
        backend.no_truncation()
        mask = backend.encode("a").special_tokens_mask
        ids = backend.encode("a").ids
        front = mask.index(0) if 0 in mask else 0
        back = mask[::-1].index(0) if 0 in mask else 0
        self._front: list[int] = list(ids[:front])
        self._back: list[int] = list(ids[len(ids) - back :])
        plain = [list(backend.encode(part, add_special_tokens=False).ids) for part in ("one two", "one", " two")]
        self._divisible = plain[0] == plain[1] + plain[2]
        """Whether a text cut before a blank gives the same ids: not where each text begins with a mark of its own."""

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Ids of a whole text, however long."""
        return finished(self.reading_tokens(text, special=special))

    def reading_tokens(self, text: str, *, special: bool) -> Generator[None, None, list[int]]:
        """`tokens` in turns: a yield between two windows."""
        ids: list[int] = []
        for place, window in enumerate(self._windows(clean(text))):
            if place:
                yield
            self._backend.no_truncation()
            ids += self._backend.encode(window, add_special_tokens=False).ids
        return [*self._front, *ids, *self._back] if special else ids

    def texts(self, prompt: str, texts: Sequence[str]) -> list[tuple[Row, bool]]:
        """Each text as one row with the prompt before it, and whether it was cut."""
        prompt = clean(prompt)
        skip = self._skipped(prompt)
        whole = [(prompt + clean(text)).strip() for text in texts]
        return [
            (self._row(encoding, skip), bool(encoding.overflowing))
            for encoding in self._encoded([(text, None) for text in whole])
        ]

    def pairs(self, query: str, documents: Sequence[str]) -> list[tuple[Row, bool]]:
        """The query with each document as one row, and whether something was cut: of the longer of the two first, as CrossEncoder does."""
        query = clean(query).strip()
        both = [(query, clean(document).strip()) for document in documents]
        return [(self._row(encoding, 0), bool(encoding.overflowing)) for encoding in self._encoded(both)]

    def pieces(self, prompt: str, text: str) -> list[Row]:
        """The whole text as one row, or as several where it is longer than `most`: each with the prompt and the special tokens."""
        return finished(self.reading_pieces(prompt, text))

    def reading_pieces(self, prompt: str, text: str) -> Generator[None, None, list[Row]]:
        """`pieces` in turns: a yield between two windows."""
        prompt = clean(prompt)
        lead = len(prompt) - len(prompt.lstrip())
        boundary = max(0, len(prompt) - lead)
        before = 0
        ids: list[int] = []
        for place, window in enumerate(self._windows((prompt + clean(text)).strip())):
            if place:
                yield
            self._backend.no_truncation()
            encoding = self._backend.encode(window, add_special_tokens=False)
            if boundary and not place:  # no prompt is longer than a window
                before = sum(1 for _ in takewhile(lambda span: span[1] <= boundary, encoding.offsets))
            ids += encoding.ids
        head, content = ids[:before], ids[before:]
        room = self.most - len(self._front) - len(self._back) - len(head)
        if room < 1:
            # The prompt alone fills the model: what is left of it is one cut row, as `texts` makes it.
            return [self.texts(prompt, [text])[0][0]]
        skip = self._skipped(prompt)
        runs = [content[at : at + room] for at in range(0, len(content), room)] or [[]]
        return [self._from_ids([*self._front, *head, *run, *self._back], skip, len(run)) for run in runs]

    def _windows(self, text: str) -> Iterator[str]:
        """The text in windows, each but the first beginning with the blank between two words (or anywhere, where there is none)."""
        at = 0
        while self._divisible and len(text) - at > WINDOW_CHARACTERS:
            end = at + WINDOW_CHARACTERS
            blank = text.rfind(" ", at + 1, end)
            while blank > at + 1 and text[blank - 1].isspace():
                blank = text.rfind(" ", at + 1, blank)
            if blank > at + 1 and not text[blank + 1].isspace():
                end = blank
            yield text[at:end]
            at = end
        yield text[at:]

    def _skipped(self, prompt: str) -> int:
        if not self._skip_prompt or not prompt:
            return 0
        self._backend.no_truncation()
        return len(self._backend.encode(prompt).ids) - len(self._back)

    def _encoded(self, inputs: Sequence[tuple[str, str | None]]) -> list[Any]:
        """Encodings cut to `most`; `overflowing` is not empty exactly where something was lost."""
        self._backend.enable_truncation(max_length=self.most)
        first = self.most * CHARACTERS_PER_TOKEN
        few = [(text[:first], pair if pair is None else pair[:first]) for text, pair in inputs]
        encodings = self._backend.encode_batch([text if pair is None else (text, pair) for text, pair in few])
        for index, ((text, pair), (cut_text, cut_pair)) in enumerate(zip(inputs, few, strict=True)):
            lost = len(cut_text) < len(text) or (
                pair is not None and cut_pair is not None and len(cut_pair) < len(pair)
            )
            # Many blanks, or very long words: what was read may still be less than the model takes.
            if lost and not encodings[index].overflowing:
                encodings[index] = self._backend.encode(text, pair)
        return list(encodings)

    def _row(self, encoding: Any, skip: int) -> Row:
        ids = encoding.ids
        if not ids:
            # A tokenizer without special tokens makes nothing of an empty text; the model still needs one position.
            return self._from_ids([self._pad_id], 0, 1)
        return Row(
            np.asarray(ids, dtype=np.int64),
            np.asarray(encoding.type_ids, dtype=np.int64),
            min(skip, len(ids) - 1),
            len(ids),
        )

    def _from_ids(self, ids: list[int], skip: int, content: int) -> Row:
        ids = ids or [self._pad_id]
        array = np.asarray(ids, dtype=np.int64)
        return Row(array, np.zeros_like(array), min(skip, len(ids) - 1), content)
