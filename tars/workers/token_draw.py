"""Which token comes next, given one sequence's logits: bias, penalties, top-k, top-p, min-p, temperature, and a draw without memory.

Law of this file: numpy and numbers, no model, no grammar, no request. Stages, their order and their formulas are llama.cpp's
(`src/llama-sampler.cpp`; a test compares the kept tokens and their probabilities with llama.cpp's own samplers). The draw is ours: u is a
hash of (seed, position), so a sequence that is continued, preempted or moved to another machine draws what it would have drawn. Candidates
stand in one order, logit descending and id ascending (all of the vocabulary: by id), so that equal numbers always give the same token.

Why not llama.cpp's samplers: they copy the whole vocabulary into structures for every token, and their generator has a state.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from tars.messages.inference import GenerationParams

Row = np.ndarray[Any, np.dtype[np.float32]]
"""Logits of one position, [vocabulary]."""
Ids = np.ndarray[Any, np.dtype[np.intp]]
Weights = np.ndarray[Any, np.dtype[np.float64]]

PENALTY_WINDOW = 64
"""Tokens that the penalties look back on, the prompt's end included: llama.cpp's default."""

BLOCK = 64
"""Logits whose maxima are compared first in `best`: the work is then vocabulary / 64 for the sort and one pass for the rest."""

NUCLEUS_FIRST = 256
"""Tokens tried first where top-p stands without top-k; llama.cpp's number."""


def uniform(seed: int, position: int, attempt: int) -> float:
    """A number in [0, 1), the same on every machine: 53 bits of BLAKE2b of (seed, position, attempt).

    `attempt` is 0 for a position's first draw, 1 for the one after a grammar refused that token (the same number again would be biased).
    """
    digest = hashlib.blake2b(struct.pack("<QQB", seed, position, attempt), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def best(row: Row, count: int) -> Ids:
    """Indices of the `count` largest values, largest first, equal ones by index.

    The count-th largest of the blocks' maxima is a bound that at least `count` values reach, and few more do; so nothing of the
    vocabulary's length is ever sorted.
    """
    size = len(row)
    blocks = size // BLOCK
    if count >= size:
        found = np.arange(size)
    elif blocks < 2 * count:
        bound = np.partition(row, size - count)[size - count]
        found = np.flatnonzero(row >= bound)
    else:
        # Down the columns: element-wise maxima of long rows are what processors do best.
        maxima = row[: blocks * BLOCK].reshape(BLOCK, blocks).max(axis=0)
        maxima.partition(blocks - count)
        found = (row >= maxima[blocks - count]).nonzero()[0]
    return found[(-row[found]).argsort(kind="stable")[:count]]


class TokenDraw:
    """One sequence's way from logits to a token. Its only state is the penalties' window."""

    def __init__(self, params: GenerationParams, bias: dict[int, float], tokens: Sequence[int], seed: int) -> None:
        """`tokens`: the prompt's and those generated so far, of which the last `PENALTY_WINDOW` count for penalties."""
        self._seed = seed
        self._top_k, self._top_p, self._temperature = params.top_k, params.top_p, params.temperature
        self._least_ratio = math.log(params.min_p) if params.min_p > 0 else None
        self._bias_ids = np.fromiter(bias.keys(), dtype=np.intp, count=len(bias))
        self._bias_values = np.fromiter(bias.values(), dtype=np.float32, count=len(bias))
        self._repeat = np.float32(params.repeat_penalty)
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._penalised = params.repeat_penalty != 1.0 or self._frequency != 0.0 or self._presence != 0.0
        self._window: deque[int] = deque()
        self._counts: dict[int, int] = {}
        for token in tokens[-PENALTY_WINDOW:]:
            self.accept(token)
        self.greedy = self._temperature == 0 or self._top_k == 1
        """Always the best token: no draw."""
        self.plain = self.greedy and not bias and not self._penalised
        """The best token of the raw logits."""

    def accept(self, token: int) -> None:
        """Count a token for the penalties of those after it."""
        if not self._penalised:
            return
        if len(self._window) == PENALTY_WINDOW:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        self._window.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def adjusted(self, logits: Row) -> Row:
        """`logits` with bias and penalties: a copy where there are any, else `logits` itself."""
        if not len(self._bias_ids) and not self._counts:
            return logits
        row = logits.copy()
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias_values
        if self._counts:
            ids = np.fromiter(self._counts.keys(), dtype=np.intp, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            values = row[ids]
            # The paper only divides, which would make tokens with negative logits likelier.
            values = np.where(values <= 0, values * self._repeat, values / self._repeat)
            row[ids] = values - (counts * np.float32(self._frequency) + np.float32(self._presence))
        return row

    def kept(self, row: Row) -> tuple[Ids, Weights]:
        """What may be drawn from adjusted logits: ids in the order of the draw, and their probabilities times a common factor."""
        if self.greedy:
            return np.array([int(row.argmax())]), np.ones(1)
        if self._top_k > 0:
            ids = best(row, self._top_k)
        elif self._top_p < 1:
            ids = self._nucleus(row)
        elif self._least_ratio is not None:
            ids = np.flatnonzero(row >= row.max() + np.float32(self._least_ratio))
            ids = ids[np.argsort(-row[ids], kind="stable")]
        else:
            # All of them, so their order says nothing and sorting them would take milliseconds.
            ids = np.arange(len(row))
        values = row[ids].astype(np.float64)
        values -= values.max()
        if self._top_k > 0 and self._top_p < 1:
            cumulated = np.exp(values).cumsum()
            values = values[: int(cumulated.searchsorted(self._top_p * cumulated[-1])) + 1]
        if self._least_ratio is not None:
            # Descending: the kept ones are a prefix.
            values = values[: int((-values).searchsorted(-self._least_ratio, side="right"))]
        return ids[: len(values)], np.exp(values / self._temperature)

    def draw(self, row: Row, position: int, attempt: int = 0) -> int:
        """One index of adjusted logits."""
        if self.greedy:
            return int(row.argmax())
        ids, weights = self.kept(row)
        cumulated = weights.cumsum()
        at = int(cumulated.searchsorted(uniform(self._seed, position, attempt) * cumulated[-1], side="right"))
        # The product may round up to the sum; behind the place where that is reached only tokens of weight 0 follow.
        return int(ids[min(at, int(cumulated.searchsorted(cumulated[-1])))])

    def _nucleus(self, row: Row) -> Ids:
        """The fewest best tokens whose probabilities reach top-p, best first."""
        most = row.max()
        # float32 is what llama.cpp computes in; the sum in float64, because 128,000 small terms lose digits.
        wanted = self._top_p * float(np.exp(row - most).sum(dtype=np.float64))
        count = NUCLEUS_FIRST
        while True:
            ids = best(row, min(count, len(row)))
            cumulated = np.exp(row[ids].astype(np.float64) - most).cumsum()
            if cumulated[-1] >= wanted or len(ids) == len(row):
                return ids[: int(cumulated.searchsorted(wanted)) + 1]
            count *= 8


def greedy_rows(rows: Row) -> list[int | None]:
    """The best token of every row of [sequences, vocabulary]; None where a row holds NaN or nothing finite."""
    tokens = rows.argmax(axis=1)
    # argmax takes the first NaN for the largest, so looking at the chosen ones is looking at all.
    finite = np.isfinite(rows[np.arange(len(rows)), tokens])
    return [token if good else None for token, good in zip(tokens.tolist(), finite.tolist(), strict=True)]
