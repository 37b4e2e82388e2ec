"""What a home of an idempotency key remembers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.idempotency_keys import (
    KEEP_SECONDS,
    LARGEST_ANSWER,
    RUNNING_SECONDS,
    Claim,
    KeyState,
    KeyTable,
    homes_of,
    new_homes,
)
from tars.core.types import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
FIRST = Claim(A, "token-a")
SECOND = Claim(B, "token-b")


@pytest.fixture
def table():
    return KeyTable()


def test_the_first_who_asks_runs_the_call_and_the_second_hears_of_it(table):
    assert table.claim("k", "x", FIRST, 0).state is KeyState.GRANTED
    reply = table.claim("k", "x", SECOND, 1)
    assert (reply.state, reply.claim) == (KeyState.RUNNING, FIRST)


def test_an_answer_is_given_to_all_who_ask_later(table):
    table.claim("k", "x", FIRST, 0)
    assert table.settle("k", "x", FIRST, 1, answer=b"42").state is KeyState.ANSWERED
    for claim in (FIRST, SECOND):
        reply = table.claim("k", "x", claim, 2)
        assert (reply.state, reply.answer) == (KeyState.ANSWERED, b"42")


def test_after_a_failure_the_key_is_free(table):
    table.claim("k", "x", FIRST, 0)
    table.settle("k", "x", FIRST, 1, failed=True)
    assert table.claim("k", "y", SECOND, 2).state is KeyState.GRANTED


@pytest.mark.parametrize("answered", [False, True])
def test_another_body_is_refused_whoever_asks(table, answered):
    table.claim("k", "x", FIRST, 0)
    if answered:
        table.settle("k", "x", FIRST, 0, answer=b"42")
    for claim in (FIRST, SECOND):
        assert table.claim("k", "y", claim, 1, lives=lambda node: False).state is KeyState.CONFLICT
    assert table.settle("k", "y", SECOND, 1, answer=b"no").state is KeyState.CONFLICT


def test_asking_again_with_the_same_claim_changes_nothing(table):
    first = table.claim("k", "x", FIRST, 0)
    assert table.claim("k", "x", FIRST, 1) == first
    assert len(table) == 1


@pytest.mark.parametrize("how", ["dead", "not found", "restarted"])
def test_a_call_whose_owner_is_gone_passes_on_with_a_higher_epoch(table, how):
    table.claim("k", "x", FIRST, 0)
    successor = Claim(A, "token-new") if how == "restarted" else SECOND
    reply = table.claim(
        "k",
        "x",
        successor,
        1,
        lives=lambda node: how != "dead" or node != A,
        gone=FIRST.token if how == "not found" else None,
    )
    assert reply.state is KeyState.GRANTED
    assert reply.claim == Claim(successor.owner, successor.token, 2)


def test_who_was_found_gone_before_does_not_free_the_key_of_the_one_after(table):
    table.claim("k", "x", SECOND, 0)
    assert table.claim("k", "x", Claim(C, "token-c"), 1, gone=FIRST.token).state is KeyState.RUNNING


def test_an_owner_that_thaws_learns_who_took_over(table):
    table.claim("k", "x", FIRST, 0)
    second = table.claim("k", "x", SECOND, 1, gone=FIRST.token).claim
    reply = table.settle("k", "x", FIRST, 2, answer=b"late")
    assert (reply.state, reply.claim) == (KeyState.RUNNING, second)
    table.settle("k", "x", second, 3, answer=b"42")
    reply = table.settle("k", "x", FIRST, 4, answer=b"late")
    assert (reply.state, reply.claim, reply.answer) == (KeyState.ANSWERED, second, b"42")


def test_of_two_answers_that_of_who_took_over_stays(table):
    table.settle("k", "x", FIRST, 0, answer=b"late")
    taken_over = Claim(B, "token-b", 2)
    assert table.settle("k", "x", taken_over, 1, answer=b"42").claim == taken_over
    reply = table.settle("k", "x", FIRST, 2, answer=b"late")
    assert (reply.claim, reply.answer) == (taken_over, b"42")


def test_an_owner_that_thaws_and_fails_does_not_free_its_successors_key(table):
    table.claim("k", "x", FIRST, 0)
    table.claim("k", "x", SECOND, 1, gone=FIRST.token)
    table.settle("k", "x", FIRST, 2, failed=True)
    assert table.claim("k", "x", Claim(C, "token-c"), 3).state is KeyState.RUNNING


def test_a_home_that_was_told_less_follows_the_higher_epoch(table):
    table.claim("k", "x", FIRST, 0)
    taken_over = Claim(B, "token-b", 2)
    assert table.claim("k", "x", taken_over, 1).state is KeyState.GRANTED
    assert table.settle("k", "x", taken_over, 2, answer=b"42").claim == taken_over


def test_a_claim_that_came_after_its_own_answer_does_not_undo_it(table):
    table.settle("k", "x", FIRST, 0, answer=b"42")
    assert table.claim("k", "x", FIRST, 1).state is KeyState.ANSWERED


def test_a_large_answer_lies_with_its_owner_and_is_lost_with_it(table):
    table.claim("k", "x", FIRST, 0)
    table.settle("k", "x", FIRST, 1, answer=bytes(LARGEST_ANSWER + 1))
    assert table.size == 0
    reply = table.claim("k", "x", SECOND, 2)
    assert (reply.state, reply.claim, reply.answer) == (KeyState.ANSWERED, FIRST, None)
    assert table.claim("k", "x", SECOND, 3, gone=FIRST.token).state is KeyState.GRANTED


def test_answers_are_forgotten_after_their_time_whatever_runs_beside_them(table):
    table.claim("long", "x", FIRST, 0)
    table.settle("k", "x", FIRST, 1, answer=b"42")
    assert table.claim("k", "x", SECOND, KEEP_SECONDS).state is KeyState.ANSWERED
    assert table.claim("k", "x", SECOND, KEEP_SECONDS + 1).state is KeyState.GRANTED
    assert table.claim("long", "x", SECOND, RUNNING_SECONDS - 1).state is KeyState.RUNNING
    assert table.claim("long", "x", SECOND, RUNNING_SECONDS).state is KeyState.GRANTED


def test_a_flood_of_answers_pushes_out_the_oldest_answers_and_no_running_call():
    table = KeyTable(most_keys=4, most_bytes=100)
    table.claim("running", "x", FIRST, 0)
    for number in range(6):
        table.settle(f"k{number}", "x", FIRST, number, answer=bytes(30))
    assert table.size == 90
    assert [kept.key for kept in table.kept(6)] == ["running", "k3", "k4", "k5"]


def test_homes_are_two_of_the_nodes_and_stay_while_others_come_and_go():
    nodes = [NodeId(f"node-{number}") for number in range(7)]
    for number in range(50):
        first, second = homes_of(str(number), nodes)
        assert first != second
        others = [node for node in nodes if node not in (first, second)]
        assert homes_of(str(number), [second, first, *others[2:]]) == (first, second)
        # The death of the first one leaves the second one first.
        assert homes_of(str(number), [second, *others])[0] == second
    assert homes_of("k", [A]) == (A,)
    assert homes_of("k", []) == ()


def test_homes_that_are_new_are_told_by_the_owner_or_by_one_of_the_old_homes():
    before = {NodeId(name) for name in "abcd"}
    for key in (f"k{number}" for number in range(50)):
        old = homes_of(key, before)
        assert new_homes(key, before, before) == ()
        comes = before | {NodeId("e")}
        assert set(new_homes(key, before, comes)) == set(homes_of(key, comes)) & {"e"}
        for goes in old:
            after = before - {goes}
            (new,) = new_homes(key, before, after)
            assert (new in homes_of(key, after), new in old) == (True, False)
            told = {teller: new_homes(key, before, after, teller) for teller in after}
            (left,) = set(old) - {goes}
            assert {teller for teller, homes in told.items() if homes} == {left}
            assert told[left] == (new,)
        # Where none of the old homes lives, each that knows it tells.
        nobody = before - set(old)
        assert all(set(new_homes(key, before, nobody, teller)) == nobody for teller in nobody)


def test_keys_are_spread_over_all_nodes():
    nodes = [NodeId(f"node-{number}") for number in range(5)]
    firsts = [homes_of(str(number), nodes)[0] for number in range(1000)]
    assert min(firsts.count(node) for node in nodes) > 120


OWNERS = [A, B, C]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["claim", "settle", "fail", "gone"]), st.sampled_from(OWNERS), st.sampled_from(["x", "y"])
        ),
        max_size=40,
    )
)
def test_whatever_comes_in_whatever_order_an_answer_once_given_stays(steps):
    """One home. The first answer of its epoch that it took is the only one that it says; epochs never fall."""
    table = KeyTable()
    said: set[bytes] = set()
    epoch, bodies = 0, set()
    for number, (what, owner, body) in enumerate(steps):
        claim = Claim(owner, f"token-{owner}-{number if what == 'gone' else 0}")
        if what in ("claim", "gone"):
            holder = next((kept.claim.token for kept in table.kept(number)), None)
            reply = table.claim("k", body, claim, number, gone=holder if what == "gone" else None)
            if reply.state is KeyState.GRANTED:
                assert not said
        else:
            reply = table.settle("k", body, claim, number, answer=f"{number}".encode(), failed=what == "fail")
        kept = table.kept(number)
        if reply.state is KeyState.ANSWERED:
            assert reply.answer in (None, kept[0].answer)
            said.add(kept[0].answer)
            bodies.add(body)
        assert len(kept) <= 1
        if kept:
            assert kept[0].claim.epoch >= epoch or said
        epoch = kept[0].claim.epoch if kept else 0
    assert len(said) <= 1
    assert len(bodies) <= 1
