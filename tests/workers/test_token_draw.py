"""The draw: best tokens in a fixed order, frequencies that are the softmax's, and nothing remembered but the seed and the place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tars.messages.inference import CompleteParams
from tars.workers.token_draw import PENALTY_WINDOW, TokenDraw, best, greedy_rows, uniform


def draw_of(
    tokens: list[int] | None = None, bias: dict[int, float] | None = None, seed: int = 1, **params: Any
) -> TokenDraw:
    return TokenDraw(CompleteParams(prompt="x", **params), bias or {}, tokens or [], seed)


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 32_000])
@pytest.mark.parametrize("count", [1, 2, 40, 300, 100_000])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_are_what_a_stable_sort_gives(size: int, count: int, ties: bool) -> None:
    dice = np.random.default_rng(size + count)
    row = dice.integers(0, 9, size).astype(np.float32) if ties else dice.standard_normal(size).astype(np.float32)
    assert best(row, count).tolist() == np.argsort(-row, kind="stable")[:count].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 2.0, "top_k": 3}])
def test_frequencies_are_the_softmaxs(params: dict[str, Any]) -> None:
    """Chi-square with fixed seeds: 0.001 of random ones would be beyond the bound."""
    logits = np.array([2.0, 1.5, 1.0, 1.0, 0.0, -1.0], dtype=np.float32)
    draw = draw_of(**params)
    ids, weights = draw.kept(logits)
    temperature = params.get("temperature", 0.8)
    expected = np.exp(logits[ids].astype(float) / temperature)
    expected /= expected.sum()
    assert weights / weights.sum() == pytest.approx(expected)
    bounds = {3: 13.8, 4: 16.3, 5: 18.5, 6: 20.5}
    rounds = 5_000
    # Over places of one sequence, over seeds, and over the second attempts: each has to look independent.
    ways = [
        [draw.draw(logits, place) for place in range(rounds)],
        [draw_of(seed=seed, **params).draw(logits, 3) for seed in range(rounds)],
        [draw.draw(logits, place, attempt=1) for place in range(rounds)],
    ]
    for drawn in ways:
        counts = np.bincount(drawn, minlength=len(logits))[ids]
        assert counts.sum() == rounds, "something that was cut was drawn"
        assert ((counts - rounds * expected) ** 2 / (rounds * expected)).sum() < bounds[len(ids)]


def test_numbers_are_the_same_everywhere_and_different_in_each_place() -> None:
    assert uniform(1, 0, 0) == 0.37600202903288227
    numbers = {uniform(seed, place, attempt) for seed in range(20) for place in range(20) for attempt in range(2)}
    assert len(numbers) == 800
    assert all(0 <= number < 1 for number in numbers)


def test_the_place_alone_decides_and_not_what_was_drawn_before() -> None:
    row = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    one, other = draw_of(seed=4), draw_of(seed=4)
    for place in range(50):
        one.draw(row, place)
    assert [one.draw(row, place) for place in range(50, 70)] == [other.draw(row, place) for place in range(50, 70)]


def test_penalties_look_back_so_far_and_no_further() -> None:
    row = np.zeros(10, dtype=np.float32)
    row[3] = 1.0
    draw = draw_of([3, 3], presence_penalty=2.0, frequency_penalty=0.25, temperature=0.0)
    assert draw.adjusted(row)[3] == 1.0 - 2.0 - 2 * 0.25
    assert row[3] == 1.0, "the model's own row stays"
    for _ in range(PENALTY_WINDOW - 1):
        draw.accept(4)
    assert draw.adjusted(row)[3] == 1.0 - 2.0 - 0.25
    draw.accept(4)
    assert draw.adjusted(row)[3] == 1.0
    # Multiplied where negative, divided where positive: both less likely.
    repeat = draw_of([3, 5], repeat_penalty=2.0)
    row[5] = -1.0
    assert repeat.adjusted(row)[[3, 5]].tolist() == [0.5, -2.0]


def test_what_is_at_minus_infinity_is_never_drawn() -> None:
    row = np.full(100, -np.inf, dtype=np.float32)
    row[[7, 60]] = [1.0, 0.0]
    for params in ({}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 0, "top_p": 1.0}):
        draw = draw_of(**params)
        assert {draw.draw(row, place) for place in range(300)} == {7, 60}


def test_greedy_takes_the_first_of_the_best() -> None:
    rows = np.zeros((3, 200), dtype=np.float32)
    rows[0, [50, 20]] = 2.0
    rows[1, 199] = 1.0
    rows[2, 5] = np.nan
    assert greedy_rows(rows) == [20, 199, None]
    draw = draw_of(temperature=0.0)
    assert draw.plain
    assert draw.draw(rows[0], 0) == 20
    assert not draw_of(temperature=0.0, bias={3: 1.0}).plain
    assert not draw_of(temperature=0.0, repeat_penalty=1.1).plain
    assert draw_of(bias={3: 1.0}, temperature=0.0).draw(draw_of(bias={3: 9.0}).adjusted(rows[0]), 0) == 3
