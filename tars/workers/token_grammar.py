"""A grammar over a model's tokens: which may come next, and the state after one.

Law of this file: bytes of tokens on one side, `grammar_states` on the other; no logits, no native code. Tokens need not end between
characters: what began and did not end waits as `Place.unfinished`, and is only allowed where some character that begins so is.
UTF-8 is kept whole by that: bytes that can begin no character are never allowed.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tars.workers.gbnf import parse
from tars.workers.grammar_states import Automaton, State

Ids = np.ndarray[Any, np.dtype[np.intp]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
"""[vocabulary]: whether a token may come next."""

ALLOWANCE_MOST = 250_000
"""Of one sequence, in `Automaton.work`: measured 80 ms of everybody's time on one slow core. A count and not a clock, so that it does not
depend on what else the machine does; JSON schemas take some hundreds for a new state and nothing for a known one."""

ALLOWANCE_GROWTH = 2_000
"""With each token, up to `ALLOWANCE_MOST`: so the longest answer is held up by less than a millisecond a token."""

FEW_CLASSES = 1024
"""Up to so many classes of characters all successors of a state are looked at, to find those that lead back to it."""

MASKS_KEPT = 64
"""As bits, so 16 KB each for 128,000 tokens. An answer in JSON meets a dozen states again and again."""


class TokenTexts:
    """The vocabulary in the order of its texts, so that tokens that begin alike are looked at once. Made once a model; never changes."""

    def __init__(self, pieces: Sequence[bytes], end_tokens: Iterable[int]) -> None:
        """`pieces`: bytes of every token, empty for control tokens, which no grammar allows."""
        self.pieces = pieces
        self.end_tokens = frozenset(end_tokens)
        self.texts: list[str | None] = [_text(piece) for piece in pieces]
        """None where the bytes are not whole characters by themselves, or none at all."""
        self.broken = [
            token for token, piece in enumerate(pieces) if piece and self.texts[token] is None and b"\0" not in piece
        ]
        """Tokens that begin or end inside a character."""
        self.continuing = [token for token in self.broken if 0x80 <= pieces[token][0] < 0xC0]
        """Those of them that go on with one."""
        ordered = sorted(
            (text, token) for token, text in enumerate(self.texts) if text and token not in self.end_tokens
        )
        self.sorted_texts = [text for text, _ in ordered]
        self.sorted_tokens = np.array([token for _, token in ordered], dtype=np.intp)
        self.shared = [
            0,
            *(_shared(one, other) for one, other in zip(self.sorted_texts, self.sorted_texts[1:], strict=False)),
        ]
        """Of each text: how many characters it has in common with the one before."""
        begins = [index for index, shared in enumerate(self.shared[: len(ordered)]) if not shared]
        self.group_starts = np.array([*begins, len(ordered)], dtype=np.intp)
        """First index of the texts that begin with the same character, and the index behind the last ones."""
        self.group_characters = np.array([ord(self.sorted_texts[begin][0]) for begin in begins], dtype=np.intp)
        self.joined = "\0".join(self.sorted_texts)
        self.joined_starts = np.cumsum([0, *(len(text) + 1 for text in self.sorted_texts[:-1])])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence stands."""

    state: State
    unfinished: bytes = b""
    """Bytes of a character that began."""


class TokenGrammar:
    """One grammar for one vocabulary. Compile it in any thread (no native code, no shared state); use it in one."""

    def __init__(self, text: str, tokens: TokenTexts) -> None:
        """Raises `BadGrammar`."""
        self._tokens = tokens
        grammar = parse(text)
        self._automaton = Automaton(grammar)
        self._borders = grammar.borders
        self._group_classes = np.searchsorted(grammar.borders, tokens.group_characters, side="right") - 1
        self._first_classes: dict[int, int] = {}
        """Classes that texts of the vocabulary begin with, and how many do."""
        for kind, count in zip(self._group_classes.tolist(), np.diff(tokens.group_starts).tolist(), strict=True):
            self._first_classes[kind] = self._first_classes.get(kind, 0) + count
        self._masks: OrderedDict[State, np.ndarray[Any, np.dtype[np.uint8]]] = OrderedDict()
        self.start = Place(self._automaton.start)

    def allow(self, work: int) -> None:
        """How much work the calls until the next `allow` may take together; beyond it they raise `BadGrammar`."""
        self._automaton.work, self._automaton.work_most = 0, work

    def spent(self) -> int:
        """Work since the last `allow`."""
        return self._automaton.work

    def after(self, place: Place, token: int) -> Place | None:
        """Where the sequence stands after `token`; None where it may not come. An end token leaves it where it was."""
        if token in self._tokens.end_tokens:
            return place if place.state.accepting and not place.unfinished else None
        text = self._tokens.texts[token]
        if text is not None and not place.unfinished:
            state = self._automaton.after_text(place.state, text)
            return None if state is None else Place(state)
        piece = self._tokens.pieces[token]
        if not piece or b"\0" in piece:
            return None
        data = place.unfinished + piece
        rest = unfinished(data)
        if rest is None:
            return None
        state = self._automaton.after_text(place.state, data[: len(data) - len(rest)].decode())
        if state is None or (rest and not self._may_become(state, rest)):
            return None
        return Place(state, rest)

    def mask(self, place: Place) -> Mask:
        """Every token that may come next."""
        if place.unfinished:
            mask = np.zeros(len(self._tokens.pieces), dtype=np.bool_)
            mask[[token for token in self._tokens.continuing if self.after(place, token) is not None]] = True
            return mask
        kept = self._masks.get(place.state)
        if kept is None:
            kept = self._masks[place.state] = np.packbits(self._whole_mask(place))
            if len(self._masks) > MASKS_KEPT:
                self._masks.popitem(last=False)
        else:
            self._masks.move_to_end(place.state)
        return np.unpackbits(kept, count=len(self._tokens.pieces)).view(np.bool_)

    def _whole_mask(self, place: Place) -> Mask:
        tokens, state = self._tokens, place.state
        mask = np.zeros(len(tokens.pieces), dtype=np.bool_)
        mask[[token for token in tokens.broken if self.after(place, token) is not None]] = True
        if state.accepting:
            mask[list(tokens.end_tokens)] = True
        successors = {kind: self._automaton.after(state, kind) for kind in self._first_classes}
        looping = sum(count for kind, count in self._first_classes.items() if successors[kind] is state)
        if 2 * looping > len(tokens.sorted_texts) and len(self._borders) <= FEW_CLASSES:
            mask[tokens.sorted_tokens[self._by_leaving(state)]] = True
        else:
            going_on = [kind for kind, successor in successors.items() if successor is not None]
            for group in np.flatnonzero(np.isin(self._group_classes, going_on)).tolist():
                begin, end = tokens.group_starts[group : group + 2].tolist()
                mask[tokens.sorted_tokens[self._by_walking(state, begin, end)]] = True
        return mask

    def _by_leaving(self, state: State) -> Ids:
        """Indices of allowed texts where most characters lead back to `state`, as in a string: only the texts with others are walked."""
        tokens, borders = self._tokens, [*self._borders, sys.maxunicode + 1]
        back = "".join(
            f"\\U{borders[kind]:08x}-\\U{min(borders[kind + 1], sys.maxunicode + 1) - 1:08x}"
            for kind in range(len(self._borders))
            if borders[kind] <= sys.maxunicode and self._automaton.after(state, kind) is state
        )
        leaving = [found.start() for found in re.finditer(f"[^\\0{back}]", tokens.joined)]
        others = np.unique(np.searchsorted(tokens.joined_starts, leaving, side="right") - 1)
        allowed = np.ones(len(tokens.sorted_texts), dtype=np.bool_)
        allowed[others] = [
            self._automaton.after_text(state, tokens.sorted_texts[index]) is not None for index in others.tolist()
        ]
        return np.flatnonzero(allowed)

    def _by_walking(self, start: State, begin: int, end: int) -> list[int]:
        """Indices of allowed texts in a part of them."""
        automaton, texts, common = self._automaton, self._tokens.sorted_texts, self._tokens.shared
        allowed = []
        # States after each character of the text before: what two texts share is walked once, and not at all where it already failed.
        path = [start]
        for index in range(begin, end):
            shared = common[index]
            if shared >= len(path):
                continue
            del path[shared + 1 :]
            state = path[-1]
            for character in texts[index][shared:]:
                kind = automaton.character_class(character)
                following = state.successors[kind] if kind in state.successors else automaton.after(state, kind)
                if following is None:
                    break
                path.append(following)
                state = following
            else:
                allowed.append(index)
        return allowed

    def _may_become(self, state: State, rest: bytes) -> bool:
        """Whether some character that begins with these bytes may come."""
        first, last = _characters(rest)
        kinds = range(self._automaton.character_class(first), self._automaton.character_class(last) + 1)
        return any(self._automaton.after(state, kind) is not None for kind in kinds)


def unfinished(data: bytes) -> bytes | None:
    """The bytes of a character that `data` ends inside of (none: b""), or None where `data` cannot begin UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    # Python waits for the third byte of what can only become a surrogate, and refuses it then.
    return None if len(rest) > 1 and rest[0] == 0xED and rest[1] >= 0xA0 else rest


def _characters(rest: bytes) -> tuple[str, str]:
    """The first and the last character of those that begin with these bytes (RFC 3629, section 4)."""
    length = 2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4
    least, most = 0x80, 0xBF
    if len(rest) == 1:
        least = {0xE0: 0xA0, 0xF0: 0x90}.get(rest[0], least)
        most = {0xED: 0x9F, 0xF4: 0x8F}.get(rest[0], most)
    missing = length - len(rest) - 1
    return (
        (rest + bytes([least]) + b"\x80" * missing).decode(),
        (rest + bytes([most]) + b"\xbf" * missing).decode(),
    )


def _text(piece: bytes) -> str | None:
    if not piece or b"\0" in piece:
        return None
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _shared(one: str, other: str) -> int:
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(index for index in range(most) if one[index] != other[index])
