"""The search over orders: what the score puts first, shown on grounds small enough to see the best answer."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.placement_search import Ground, Option, Placed, Score, Wish, _score, hash_fraction, search


def ground(*free: int, nodes: tuple[int, ...] | None = None, gpu: tuple[bool, ...] | None = None) -> Ground:
    count = len(free)
    return Ground(
        free=free,
        load=(0,) * count,
        node=nodes or tuple(range(count)),
        gpu=gpu or (True,) * count,
        strength=free,
    )


def wish(
    name: str, *needs: int | None, missing: int = 1, chat: bool = True, priority: int = 0, beside: tuple[int, ...] = ()
) -> Wish:
    """One need for each device; None: not allowed there."""
    return Wish(
        name=name,
        chat=chat,
        priority=priority,
        missing=missing,
        options=tuple(() if need is None else (Option(need, 1.0, 0),) for need in needs),
        rank=tuple(range(len(needs))),
        beside=beside or (0,) * len(needs),
    )


def devices(placed: list, name: int) -> list[int]:
    return sorted(one.device for one in placed if one.wish == name)


def test_all_are_placed_where_only_one_arrangement_holds_them() -> None:
    # 7+3, 6+4, 5+5: taking the largest free device first strands a replica.
    wishes = [wish(str(size), size, size, size) for size in (7, 6, 5, 5, 4, 3)]
    assert len(search(ground(10, 10, 10), wishes, orders=200)) == 6


def test_more_replicas_come_before_better_quality() -> None:
    large = Wish("a", True, 0, 1, ((Option(4, 1.0, 0), Option(9, 2.0, 1)),), (0,), (0,))
    placed = search(ground(10), [large, wish("b", 5)], orders=20)
    assert sorted(one.option.need for one in placed) == [4, 5]
    alone = search(ground(10), [large], orders=20)
    assert [one.option.need for one in alone] == [9]


def test_better_quality_draws_a_replica_to_the_device_that_has_room_for_it() -> None:
    options = (Option(4, 1.0, 0), Option(9, 2.0, 1))
    model = Wish("a", True, 0, 1, ((options[0],), options), (0, 1), (0, 0))
    placed = search(ground(5, 10), [model], orders=20)
    assert [(one.device, one.option.quality) for one in placed] == [(1, 2.0)]


def test_priority_comes_before_the_number_of_replicas() -> None:
    placed = search(ground(10), [wish("big", 10, priority=1), wish("small", 4, missing=2)], orders=50)
    assert [one.wish for one in placed] == [0]


def test_replicas_spread_over_nodes_counting_those_that_are_there() -> None:
    placed = search(ground(10, 10, nodes=(0, 1)), [wish("a", 3, 3, beside=(1, 0))], orders=20)
    assert devices(placed, 0) == [1]


def test_gpus_are_preferred() -> None:
    placed = search(ground(100, 10, gpu=(False, True)), [wish("a", 3, 3)], orders=20)
    assert devices(placed, 0) == [1]


def test_an_embedding_takes_the_smaller_card_and_a_chat_model_the_larger() -> None:
    placed = search(ground(10, 20), [wish("e", 2, 2, chat=False), wish("c", 6, 6)], orders=20)
    assert devices(placed, 0) == [0]
    assert devices(placed, 1) == [1]


def random_case(seed: int) -> tuple[Ground, list[Wish]]:
    """Up to 3 devices and 4 replicas, some with a second variant: few enough to try every placement."""
    rng = random.Random(seed)
    count = rng.randint(1, 3)
    free = tuple(rng.randint(5, 24) for _ in range(count))
    area = Ground(
        free=free,
        load=tuple(rng.choice([0, 0, 5]) for _ in range(count)),
        node=tuple(rng.randrange(count) for _ in range(count)),
        gpu=tuple(rng.random() < 0.8 for _ in range(count)),
        strength=tuple(rng.randint(5, 30) for _ in range(count)),
    )
    wishes = []
    for number in range(rng.randint(1, 3)):
        needs = sorted(rng.sample(range(2, 14), rng.randint(1, 2)))
        choices = [Option(need, 1.0 + place, place) for place, need in enumerate(needs)]
        wishes.append(
            Wish(
                name=str(number),
                chat=rng.random() < 0.7,
                priority=rng.choice([0, 0, 1]),
                missing=rng.randint(1, 2) if number < 2 else 1,
                options=tuple(tuple(each for each in choices if each.need <= room) for room in free),
                rank=tuple(range(count)),
                beside=(0,) * count,
            )
        )
    return area, wishes[:2] if sum(each.missing for each in wishes) > 4 else wishes


def best_by_trying_all(area: Ground, wishes: list[Wish]) -> Score:
    items = [index for index, each in enumerate(wishes) for _ in range(each.missing)]
    choices = [
        [None, *((device, option) for device, options in enumerate(wishes[index].options) for option in options)]
        for index in items
    ]
    best = _score(area, wishes, [])
    for picked in product(*choices):
        placed = [Placed(index, *one) for index, one in zip(items, picked, strict=True) if one is not None]
        left = list(area.free)
        for one in placed:
            left[one.device] -= one.option.need
        if min(left) >= 0:
            best = max(best, _score(area, wishes, placed))
    return best


@pytest.mark.slow
def test_small_cases_get_the_best_score_that_there_is() -> None:
    missed = []
    for seed in range(150):
        area, wishes = random_case(seed)
        best = best_by_trying_all(area, wishes)
        found = _score(area, wishes, search(area, wishes, orders=200))
        assert found <= best
        # The number of replicas is never missed on so small a ground; a preference may be, rarely.
        assert found[0] == best[0], seed
        if found != best:
            missed.append(seed)
    assert len(missed) <= 150 // 20, missed


def test_load_in_proportion_to_the_cards_scores_best() -> None:
    area, wishes = ground(20, 10), [wish("a", 6, 6), wish("b", 6, 6), wish("c", 6, 6)]

    def score(*where: int) -> Score:
        return _score(area, wishes, [Placed(index, device, Option(6, 1.0, 0)) for index, device in enumerate(where)])

    assert score(0, 0, 1) > score(0, 0, 0)
    assert score(0, 0, 1) > score(0, 1, 1)


def test_nothing_to_place_places_nothing() -> None:
    assert search(ground(10), [], orders=20) == []
    assert search(ground(10), [wish("a", 5, missing=0)], orders=20) == []
    assert search(ground(10), [wish("a", None)], orders=20) == []


def test_hash_fractions_are_the_same_everywhere_and_differ_by_every_part() -> None:
    assert hash_fraction("a", 1) == 0x839E11A421D370BE  # printf "a\x1f1" | sha256sum | cut -c1-16
    assert len({hash_fraction(*parts) for parts in product((0, 1), ("a", "b"), (0, 1))}) == 8


@pytest.mark.parametrize("orders", [0, 1, 2, 50])
@settings(max_examples=2 * settings().max_examples // 5)
@given(data=st.data())
def test_no_device_is_ever_over_filled(orders: int, data: st.DataObject) -> None:
    free = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    needs = st.lists(st.none() | st.integers(1, 40), min_size=len(free), max_size=len(free))
    drawn = data.draw(st.lists(needs, max_size=5))
    wishes = [
        wish(
            str(number),
            *(need if need is not None and need <= room else None for need, room in zip(each, free, strict=True)),
        )
        for number, each in enumerate(drawn)
    ]
    placed = search(
        Ground(
            tuple(free),
            (0,) * len(free),
            tuple(range(len(free))),
            (True,) * len(free),
            tuple(room + 1 for room in free),
        ),
        wishes,
        orders=orders,
    )
    left = list(free)
    for one in placed:
        left[one.device] -= one.option.need
        assert one.option in wishes[one.wish].options[one.device]
    assert min(left) >= 0
    assert len({one.wish for one in placed}) == len(placed)
