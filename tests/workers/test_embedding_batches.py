from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.workers.embedding_batches import (
    BUDGET_LEAST,
    TokenBudget,
    best_budget,
    budgets_to_try,
    next_batch,
    next_packed,
    padded,
)


@pytest.mark.parametrize(
    ("length", "result"), [(0, 16), (1, 16), (16, 16), (17, 32), (250, 256), (256, 256), (255, 256)]
)
def test_lengths_are_padded_to_sixteen(length: int, result: int) -> None:
    assert padded(length, 256) == result


def test_padding_never_exceeds_the_models_limit() -> None:
    assert padded(500, 509) == 509
    assert padded(5, 10) == 10


@pytest.mark.parametrize(
    ("lengths", "budget", "batch"),
    [
        ([10], 1, [0]),
        ([10, 10, 10], 48, [0, 1, 2]),
        ([10, 10, 10], 32, [0, 1]),
        # The nearest lengths join the oldest text; the far one waits.
        ([100, 10, 96, 104], 112 * 3, [2, 0, 3]),
        # A longer neighbour does not fit any more, a shorter one does.
        ([16, 200, 8], 32, [2, 0]),
    ],
)
def test_which_texts_go_together(lengths: list[int], budget: int, batch: list[int]) -> None:
    assert next_batch(lengths, budget, 256) == batch


@given(st.lists(st.integers(1, 256), min_size=1, max_size=60), st.integers(1, 5000))
def test_the_oldest_is_always_in_and_the_budget_holds(lengths: list[int], budget: int) -> None:
    batch = next_batch(lengths, budget, 256)
    assert 0 in batch
    assert len(set(batch)) == len(batch)
    width = max(padded(lengths[index], 256) for index in batch)
    assert len(batch) == 1 or len(batch) * width <= budget
    assert [lengths[index] for index in batch] == sorted(lengths[index] for index in batch)


@given(st.lists(st.integers(1, 256), min_size=1, max_size=40), st.integers(1, 2000))
def test_every_text_gets_its_turn(lengths: list[int], budget: int) -> None:
    left = list(enumerate(lengths))
    for _ in range(len(lengths)):
        if not left:
            break
        batch = set(next_batch([length for _, length in left], budget, 256))
        left = [text for index, text in enumerate(left) if index not in batch]
    assert not left


@pytest.mark.parametrize(
    ("lengths", "budget", "batch"),
    [
        ([10], 1, [0]),
        ([10, 10, 10], 20, [0, 1]),
        # What does not fit waits, what does goes along; nothing is padded, so lengths need not be alike.
        ([100, 250, 8, 40], 150, [0, 2, 3]),
        ([300, 8], 256, [0]),
    ],
)
def test_texts_without_padding_go_in_order_of_waiting(lengths: list[int], budget: int, batch: list[int]) -> None:
    assert next_packed(lengths, budget) == batch


@given(st.lists(st.integers(1, 256), min_size=1, max_size=60), st.integers(1, 5000))
def test_packed_batches_hold_the_budget(lengths: list[int], budget: int) -> None:
    batch = next_packed(lengths, budget)
    assert batch[0] == 0
    assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget


def test_budgets_double_up_to_what_the_memory_was_planned_for() -> None:
    assert budgets_to_try(4096, on_card=False) == [512, 1024, 2048, 4096]
    assert budgets_to_try(16384, on_card=True) == [2048, 4096, 8192, 16384]
    assert budgets_to_try(100, on_card=False) == [100]


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ([(512, 1000.0)], 512),
        ([(512, 1000.0), (1024, 1500.0), (2048, 1510.0)], 1024),
        ([(512, 1000.0), (1024, 990.0), (2048, 1200.0)], 2048),
    ],
)
def test_a_larger_budget_must_be_worth_its_wait(measured: list[tuple[int, float]], best: int) -> None:
    assert best_budget(measured) == best


def test_the_budget_is_halved_and_never_raised() -> None:
    budget = TokenBudget(4096)
    budget.shrink(4000)
    assert budget.tokens == 2000
    budget.shrink(3000)
    assert budget.tokens == 1000
    for _ in range(20):
        budget.shrink(budget.tokens)
    assert budget.tokens == BUDGET_LEAST
