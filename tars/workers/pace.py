"""How many prompt tokens a chunk may have, learned from how long the last ones took.

Law of this file: pure; seconds come in as numbers. A measurement at load knows neither the depth of a real chat nor what else the machine
does, so it only says where to begin. Up slowly and down at once, as TCP's congestion control: a time per token would mislead, for a GPU
computes 16 tokens as slowly as 256.
"""

from __future__ import annotations

STEP = 8
"""Tokens by which chunks differ."""

LEAST = 16
"""Tokens of a chunk at least: fewer read all weights for too little, and the bound then gives way."""

GROW, SHRINK, SHRINK_MOST = 1.25, 0.7, 0.125

ROOM = 0.8
"""A chunk that took at most this share of the bound leaves room for a larger one."""


class Pace:
    """`bound`: seconds that a chunk may take; `most` and `least`: tokens of a chunk."""

    def __init__(self, chunk: int, most: int, bound: float, *, least: int = LEAST) -> None:
        self._most = max(1, most)
        self._least = least
        self.bound = bound
        """May change: what counts is what it is when a chunk is reported."""
        self.chunk = max(1, min(chunk, self._most))

    def took(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        if seconds > self.bound:
            # What took too long is what was computed, however much would have been allowed.
            share = min(SHRINK, max(SHRINK_MOST, self.bound / seconds))
            self.chunk = min(self.chunk, self._whole(min(self.chunk, max(tokens, self._least)) * share))
        elif tokens >= self.chunk and seconds <= ROOM * self.bound:
            self.chunk = self._whole(max(self.chunk * GROW, self.chunk + STEP))

    def broken_off(self, tokens: int) -> None:
        """A chunk of so many tokens did not end at all: the next ones have an eighth, however few that are, until time allows more."""
        self.chunk = max(1, min(self.chunk, tokens // 8, LEAST))

    def _whole(self, tokens: float) -> int:
        return max(1, min(self._most, max(self._least, int(tokens) // STEP * STEP)))
