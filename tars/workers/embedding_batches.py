"""Which texts go through the model together: full batches of like lengths, and nobody overtaken for long.

Law of this file: pure; a text is its length in tokens. The field notes measured what this buys: token-budget batches 1.3-1.5 times plain
`encode`, lengths padded to a multiple of 16 another 1.3 times (fewer distinct shapes).
"""

from __future__ import annotations

from collections.abc import Sequence

PAD_TO = 16
"""Lengths are padded to a multiple of this: measured in the field notes."""


def padded(length: int, most: int) -> int:
    """`length` rounded up to `PAD_TO`, never above `most` (the model's position table ends there)."""
    return min(most, -(-max(1, length) // PAD_TO) * PAD_TO)


def next_batch(lengths: Sequence[int], budget: int, most: int) -> list[int]:
    """Indices of the next batch; `lengths[0]` waits longest and is always in it.

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
