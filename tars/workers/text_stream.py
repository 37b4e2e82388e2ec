"""Tokens in, text out: whole UTF-8, and nothing of a stop string.

Law of this file: pure. No vocabulary and no model; a token is its number and its bytes.

The invariant that continuing a broken stream elsewhere rests on: the text released so far is exactly the text of the token ids released
so far. So tokens are held back whole: while they end inside a UTF-8 character, and while they reach into what may become a stop string.
Only the last release may be shorter than its tokens, where a stop string cut the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Extra = TypeVar("Extra")
"""What travels with a token, such as its log probabilities."""


@dataclass(frozen=True, slots=True)
class Released(Generic[Extra]):
    """What may be shown now. Empty while everything is held back."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)


class TextStream(Generic[Extra]):
    """One generation's text. `stopped` is True once a stop string was found; then nothing more may be pushed."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string must not be empty")
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        """Decoded and not released."""
        self._held: list[tuple[int, Extra, int, bool]] = []
        """(token id, extra, length of `_text` after it, True where it ended between characters) of each token not released."""
        self.stopped = False

    def push(self, token_id: int, piece: bytes, extra: Extra) -> Released[Extra]:
        """Take one token; what it makes certain."""
        assert not self.stopped, "push after a stop string"
        self._text += self._decoder.decode(piece)
        # The decoder's state is (bytes waiting, flags): none waiting means that the token ends between characters.
        self._held.append((token_id, extra, len(self._text), not self._decoder.getstate()[0]))
        if (start := self._first_stop(self._text)) is not None:
            self.stopped = True
            self._text = self._text[:start]
            return self._release(len(self._held))
        certain = self._certain()
        count = 0
        for index, (_, _, end, whole) in enumerate(self._held):
            if end > certain:
                break
            if whole:
                count = index + 1
        return self._release(count)

    def shown_before(self, token_ids: Sequence[int], data: bytes, *, ended: bool) -> str:
        """Take the first tokens at once (`data`: the bytes of all); their text, which somebody has seen and which stays as it is.

        What made it certain may not come again, so no stop string is looked for in it; unless it had `ended`, maybe by one.
        """
        assert not self._held, "only the first tokens"
        text = self._decoder.decode(data, ended)
        if ended and (start := self._first_stop(text)) is not None:
            self.stopped = True
            text = text[:start]
        return text

    def finish(self) -> Released[Extra]:
        """The generation is over without a stop string: everything held back, an unfinished character as U+FFFD."""
        if self.stopped:
            return Released()
        self._text += self._decoder.decode(b"", True)
        return self._release(len(self._held))

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins in it."""
        return min((start for stop in self._stop if (start := text.find(stop)) >= 0), default=None)

    def _certain(self) -> int:
        """How many characters of the held text can never be part of a stop string."""
        for start in range(len(self._text)):
            if any(text.startswith(self._text[start:]) for text in self._stop):
                return start
        return len(self._text)

    def _release(self, count: int) -> Released[Extra]:
        if not count:
            return Released()
        gone, self._held = self._held[:count], self._held[count:]
        cut = len(self._text) if not self._held else gone[-1][2]
        text, self._text = self._text[:cut], self._text[cut:]
        self._held = [(token_id, extra, end - cut, whole) for token_id, extra, end, whole in self._held]
        return Released(text, [token_id for token_id, _, _, _ in gone], [extra for _, extra, _, _ in gone])
