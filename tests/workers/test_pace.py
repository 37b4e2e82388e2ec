"""The length of prefill chunks follows the clock."""

from __future__ import annotations

import pytest

from tars.workers.pace import LEAST, Pace


def settled(pace: Pace, fixed: float, per_token: float, steps: int = 60) -> list[float]:
    """Seconds of the steps on a machine that needs `fixed` and `per_token` seconds."""
    seconds = []
    for _ in range(steps):
        seconds.append(fixed + per_token * pace.chunk)
        pace.took(pace.chunk, seconds[-1])
    return seconds


@pytest.mark.parametrize("begin", [1, 16, 96, 512])
@pytest.mark.parametrize(("fixed", "per_token"), [(0.0, 0.001), (0.02, 0.0005), (0.01, 0.00001)])
def test_it_finds_a_chunk_that_uses_the_bound_wherever_it_begins(begin: int, fixed: float, per_token: float) -> None:
    pace = Pace(begin, 512, 0.15)
    last = settled(pace, fixed, per_token)[-20:]
    assert max(last) <= 0.15 * 1.3
    assert pace.chunk == 512 or max(last) >= 0.15 * 0.6


def test_a_machine_that_became_slow_is_met_within_a_few_steps() -> None:
    pace = Pace(256, 512, 0.15)
    slow = settled(pace, 0.0, 0.003, steps=8)
    assert slow[0] > 0.7
    assert slow[-1] <= 0.15


def test_a_chunk_that_did_not_end_is_followed_by_a_far_smaller_one_and_time_brings_it_back() -> None:
    pace = Pace(512, 512, 0.5, least=32)
    pace.broken_off(512)
    assert pace.chunk == 16
    pace.broken_off(16)
    assert pace.chunk == 2
    pace.took(2, 5.0)
    assert pace.chunk == 2, "it was slow still"
    settled(pace, 0.0, 0.001)
    assert pace.chunk > 300


def test_a_short_rest_of_a_prompt_does_not_make_chunks_larger() -> None:
    pace = Pace(64, 512, 0.15)
    pace.took(3, 0.001)
    assert pace.chunk == 64


def test_it_never_leaves_its_limits() -> None:
    pace = Pace(4, 5, 0.15)
    settled(pace, 1.0, 0.0)
    assert 1 <= pace.chunk <= 5
    pace = Pace(64, 512, 0.0)
    settled(pace, 1.0, 0.0)
    assert pace.chunk == LEAST


def test_where_nobody_waits_for_the_next_token_chunks_stay_large_however_slow() -> None:
    pace = Pace(512, 512, 0.5, least=64)
    settled(pace, 0.0, 0.1)
    assert pace.chunk == 64
