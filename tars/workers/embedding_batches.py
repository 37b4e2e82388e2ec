"""Which texts go through the model together: full batches of like lengths, and nobody overtaken for long.

Law of this file: pure; a text is its length in tokens. The field notes measured what this buys: token-budget batches 1.3-1.5 times plain
`encode`, lengths padded to a multiple of 16 another 1.3 times in bf16 (fewer distinct shapes).
"""

from __future__ import annotations

from collections.abc import Sequence

PAD_TO = 16
"""Lengths are padded to a multiple of this: measured in the field notes."""

BUDGET_LEAST = 16
"""Tokens of one forward pass below which halving makes no sense: one shortest text."""

FIRST_BUDGET_CPU = 512
"""The smallest budget that is tried: below it matrix products lose speed (two AVX2 cores: 54 to 65 GFLOPS at 128 rows, 67 to 84 at 512)."""
FIRST_BUDGET_CARD = 2048

BETTER = 1.03
"""A larger budget is taken only where it is so much faster: callers wait for a whole batch."""


def padded(length: int, most: int) -> int:
    """`length` rounded up to `PAD_TO`, never above `most` (the model's position table ends there)."""
    return min(most, -(-max(1, length) // PAD_TO) * PAD_TO)


def next_batch(lengths: Sequence[int], budget: int, most: int) -> list[int]:
    """Indices of the next batch where texts are padded to the longest; `lengths[0]` waits longest and is always in it.

    Around it, in order of length, neighbours are taken while count x longest padded length <= `budget` (at least one text, whatever its
    length). The nearer length goes first, so that padding stays small.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    at = order.index(0)
    low, high = at, at + 1
    width = padded(lengths[0], most)
    while True:
        below = lengths[order[low]] - lengths[order[low - 1]] if low > 0 else None
        above = lengths[order[high]] - lengths[order[high - 1]] if high < len(order) else None
        if below is None and above is None:
            break
        take_below = above is None or (below is not None and below <= above)
        new_width = width if take_below else padded(lengths[order[high]], most)
        if (high - low + 1) * new_width > budget:
            # The other side may still fit: shorter texts never widen the batch.
            if take_below or below is None or (high - low + 1) * width > budget:
                break
            take_below, new_width = True, width
        width = new_width
        if take_below:
            low -= 1
        else:
            high += 1
    return order[low:high]


def next_packed(lengths: Sequence[int], budget: int) -> list[int]:
    """Indices of the next batch where texts lie end to end without padding: in order of waiting, each that still fits.

    `lengths[0]` is always in it, whatever its length, so that nobody is overtaken twice by the same text.
    """
    batch = [0]
    left = budget - lengths[0]
    for index in range(1, len(lengths)):
        if left < 1:
            break
        if lengths[index] <= left:
            batch.append(index)
            left -= lengths[index]
    return batch


def budgets_to_try(most: int, *, on_card: bool) -> list[int]:
    """Token budgets for the measurement at load, smallest first, doubling; `most` is what the device's memory was planned for."""
    budget = min(FIRST_BUDGET_CARD if on_card else FIRST_BUDGET_CPU, most)
    budgets = [budget]
    while budget * 2 <= most:
        budget *= 2
        budgets.append(budget)
    return budgets


def best_budget(measured: Sequence[tuple[int, float]]) -> int:
    """The smallest budget from which no larger one is `BETTER`; `measured` is (budget, tokens/s), smallest first, at least one."""
    chosen, speed = measured[0]
    for budget, tokens_per_second in measured[1:]:
        if tokens_per_second >= speed * BETTER:
            chosen, speed = budget, tokens_per_second
    return chosen


class TokenBudget:
    """Tokens of one forward pass: found at load, halved when the device runs out of memory, and never raised again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = max(BUDGET_LEAST, tokens)

    def shrink(self, tried: int) -> None:
        """A batch of `tried` tokens (padding included) did not fit: remember half of it, or of the budget where that is less."""
        self.tokens = max(BUDGET_LEAST, min(self.tokens, tried) // 2)
