"""When drafting is on, how many tokens it proposes, and when it is tried again."""

from __future__ import annotations

import pytest

from tars.workers.draft_worth import LENGTHS, PROBE_AFTER, PROBE_AFTER_MOST, PROBE_STEPS, WORTH, Costs, DraftWorth


def costs(draft: float = 0.1, per_token: float = 0.1, answers: int = 2) -> Costs:
    """Of a model whose single token takes 1 s, and each more in the same decode `per_token`."""
    every = range(1, answers + 1)
    return Costs(
        draft=dict.fromkeys(every, draft),
        plain=dict.fromkeys(every, 1.0),
        checked={(count, length): 1.0 + length * per_token for count in every for length in LENGTHS},
    )


def refuse_until_off(worth: DraftWorth) -> None:
    for _ in range(200):
        length = worth.length(1)
        if not length:
            return
        worth.took(length, 0)
    raise AssertionError("it was never switched off")


@pytest.mark.parametrize(
    ("length", "share", "gain"),
    [(2, 1.0, 3 / 1.4), (4, 1.0, 5 / 1.8), (2, 0.0, 1 / 1.4), (2, 0.5, 1.75 / 1.4), (4, 0.5, 1.9375 / 1.8)],
)
def test_the_gain_is_tokens_a_second_with_over_those_without(length: int, share: float, gain: float) -> None:
    assert costs().gain(1, length, share) == pytest.approx(gain)


def test_a_draft_as_slow_as_the_model_is_hopeless_and_a_quick_one_is_not() -> None:
    assert costs(draft=1.0).hopeless
    assert not costs(draft=0.1).hopeless


def test_where_checking_costs_as_much_as_computing_there_is_no_hope() -> None:
    assert costs(draft=0.01, per_token=1.0).hopeless


def test_right_proposals_make_them_longer_and_wrong_ones_shorter() -> None:
    worth = DraftWorth(costs(draft=0.05, per_token=0.02))
    assert worth.length(1) == 4, "2.16 times as fast with 4 where 7 of 10 are right, 2.05 with 8, 1.92 with 2"
    for _ in range(30):
        worth.took(worth.length(1), worth.length(1))
    assert worth.share > 0.95
    assert worth.length(1) == 8
    for _ in range(40):
        worth.took(4, 1)
    assert worth.share == pytest.approx(0.5, abs=0.05)
    assert worth.length(1) == 2


def test_what_an_answers_end_left_untested_is_no_refusal() -> None:
    worth = DraftWorth(costs())
    before = worth.share
    worth.took(2, 2)
    assert worth.share > before
    worth.took(0, 0)
    assert worth.share > before


def test_wrong_proposals_switch_it_off_for_a_long_time() -> None:
    worth = DraftWorth(costs())
    refuse_until_off(worth)
    assert worth.share < 0.5
    assert [worth.length(1) for _ in range(PROBE_AFTER - 2)] == [0] * (PROBE_AFTER - 2)


def test_it_is_tried_again_and_goes_on_where_the_text_has_become_predictable() -> None:
    worth = DraftWorth(costs(draft=0.02, per_token=0.02))
    refuse_until_off(worth)
    for _ in range(PROBE_AFTER):
        if worth.length(1):
            break
    assert worth.length(1) == min(LENGTHS)
    for _ in range(PROBE_STEPS):
        worth.took(2, 2)
    assert worth.length(1) > 0, "eight tries with every token right"


def test_tries_that_fail_become_rarer_up_to_a_bound() -> None:
    worth = DraftWorth(costs())
    refuse_until_off(worth)
    pauses: list[int] = []
    for _ in range(8):
        pause = 0
        while not (length := worth.length(1)):
            pause += 1
        pauses.append(pause)
        for _ in range(PROBE_STEPS):
            worth.took(length, 0)
    assert pauses == sorted(pauses)
    assert pauses[0] <= PROBE_AFTER < pauses[1]
    assert pauses[-1] == PROBE_AFTER_MOST


def test_more_answers_than_were_measured_are_computed_without() -> None:
    worth = DraftWorth(costs(answers=1))
    assert worth.length(1) > 0
    assert worth.length(2) == 0


def test_tokens_behind_the_first_wrong_one_say_nothing() -> None:
    one, eight = DraftWorth(costs()), DraftWorth(costs())
    one.took(1, 0)
    eight.took(8, 0)
    assert one.share == eight.share < DraftWorth(costs()).share


def test_it_is_on_only_where_the_expected_gain_is_above_the_noise() -> None:
    worth = DraftWorth(costs())
    for _ in range(100):
        length = worth.length(1)
        if not length:
            break
        assert costs().gain(1, length, worth.share) >= WORTH
        worth.took(length, 1)
    assert worth.length(1) or max(costs().gain(1, each, worth.share) for each in LENGTHS) < WORTH
