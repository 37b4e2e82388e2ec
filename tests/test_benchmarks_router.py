"""What `scripts/bench router` concludes from its rounds."""

from __future__ import annotations

import pytest
from router import Measured, at_once, one_after_the_other


def test_rounds_are_compared_with_themselves() -> None:
    # The second round was slow for both: neither a difference nor a ratio.
    measured = Measured("x", [1.0, 11.0, 1.0], [2.0, 12.0, 2.1], [100.0, 10.0, 100.0], [95.0, 9.5, 96.0])
    assert measured.added_ms == pytest.approx(1.0)
    assert measured.share == pytest.approx(0.95)
    assert all(aim.reached for aim in measured.aims)


def test_a_slow_way_reaches_no_aim() -> None:
    assert not any(aim.reached for aim in Measured("x", [1.0], [2.6], [100.0], [89.0]).aims)


async def test_calls_are_counted_and_timed() -> None:
    made = 0

    async def call() -> None:
        nonlocal made
        made += 1

    assert await one_after_the_other(call, 5) >= 0
    assert made == 5


async def test_a_call_that_fails_ends_the_measurement() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await at_once(fails, 0.1)
