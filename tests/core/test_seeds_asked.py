"""Seeds take turns until somebody is there, and are bounded."""

from tars.core.seeds_asked import MOST_QUESTIONS, MOST_SEEDS, SeedsAsked
from tars.core.types import NodeId

N = NodeId("n")


def nobody(node):
    return False


def test_they_take_turns():
    seeds = SeedsAsked()
    assert seeds.next(nobody) is None
    assert [seeds.add(each) for each in ("a:1", "b:1", "c:1", "a:1")] == [True, True, True, False]
    assert [seeds.next(nobody) for _ in range(4)] == ["a:1", "b:1", "c:1", "a:1"]


def test_one_at_which_a_live_node_is_rests_until_that_one_is_gone():
    seeds = SeedsAsked()
    seeds.add("a:1")
    seeds.asked(5, "a:1")
    assert seeds.was_asked(5)
    assert seeds.answered(5, N) == "a:1"
    assert not seeds.was_asked(5)
    assert seeds.answered(5, N) is None, "an answer counts once"
    assert seeds.next(lambda node: node == N) is None
    assert seeds.next(nobody) == "a:1"


def test_a_question_that_did_not_arrive_is_forgotten():
    seeds = SeedsAsked()
    seeds.add("a:1")
    seeds.asked(5, "a:1")
    seeds.unanswered(5)
    seeds.unanswered(6)
    assert seeds.answered(5, N) is None
    assert seeds.next(lambda node: True) == "a:1"


def test_there_are_never_too_many():
    seeds = SeedsAsked()
    for number in range(MOST_SEEDS + 5):
        assert seeds.add(f"a:{number}")
    assert seeds.next(nobody) == "a:5"
    for number in range(MOST_QUESTIONS + 1):
        seeds.asked(number, "a:9")
    assert not seeds.was_asked(0)
    assert seeds.was_asked(MOST_QUESTIONS)
