"""Ranking replicas: tables and properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.health import BreakerState
from tars.core.mesh_messages import MemberState
from tars.core.routing import (
    COLD_PART,
    HOP_SECONDS,
    UNITS_PER_CALL,
    Candidate,
    Demand,
    predicted_seconds,
    rank,
    standing_of,
    units_of,
    usual_speed,
)
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState


def candidate(name, state=ReplicaState.READY, **more):
    return Candidate(ReplicaId(name), "m", ModelKind.CHAT, state, **more)


def choose(candidates, call_key, *demand):
    """The first of the order; None where nobody can take the call."""
    order = rank(candidates, call_key, *demand).order
    return order[0] if order else None


def test_the_replica_that_would_be_done_first_comes_first():
    busy = candidate("busy", active=1, queued=3, measured=1280)
    slow = candidate("slow", measured=25)
    idle = candidate("idle", measured=640)
    assert rank([busy, slow, idle], "key").order == ("idle", "busy", "slow")


def test_ten_and_fifty_eight_tokens_a_second_do_not_rank_equal():
    fast, slow = candidate("fast", measured=58.0), candidate("slow", measured=10.0)
    assert all(rank([slow, fast], str(key)).order[0] == "fast" for key in range(20))


def test_more_slots_shorten_the_wait():
    few, many = candidate("b", active=4, slots=1), candidate("a", active=4, slots=4)
    assert predicted_seconds(many, 128) < predicted_seconds(few, 128)


def test_the_prediction_is_the_sum_that_the_module_states():
    one = candidate("a", ahead=300.0, slots=2, measured=50.0, measured_prefill=1000.0, shared_tokens=200.0, local=False)
    assert predicted_seconds(one, 100.0, 600.0) == pytest.approx((300 / 2 + 100) / 50 + 400 / 1000 + HOP_SECONDS)


def test_only_ready_replicas_are_ranked_and_every_one_has_its_reason():
    ranked = rank(
        [
            candidate("a"),
            candidate("b", ReplicaState.LOADING),
            candidate("c", standing=MemberState.DRAINING),
            candidate("d", standing=MemberState.DEAD),
            candidate("e", standing=MemberState.LEFT),
            candidate("f", standing=MemberState.SUSPECT, local=False),
            candidate("g", breaker=BreakerState.OPEN, cooldown=2.0, measured=64.0, cold=True, shared_tokens=128),
        ],
        "key",
    )
    assert ranked.order == ("a", "g", "f")
    assert ranked.reasons["a"].startswith("rank 1: predicted")
    assert ranked.reasons["b"] == "not ready: loading"
    assert "being drained" in ranked.reasons["c"]
    assert ranked.reasons["d"] == "its node is DEAD"
    assert ranked.reasons["e"] == "its node is LEFT"
    assert "its node is SUSPECT" in ranked.reasons["f"]
    assert "one hop away" in ranked.reasons["f"]
    for said in ("64 a second measured here", "not used lately", "128 tokens", "asked last for 2.0 s more"):
        assert said in ranked.reasons["g"]


def test_a_draining_node_is_asked_where_there_is_no_other():
    draining = candidate("a", standing=MemberState.DRAINING)
    assert rank([draining, candidate("b", ReplicaState.LOADING)], "k").order == ("a",)
    assert rank([draining, candidate("b", standing=MemberState.SUSPECT)], "k").order == ("b",)


def test_a_dead_node_is_never_asked():
    assert rank([candidate("a", standing=MemberState.DEAD)], "k").order == ()
    assert choose([candidate("a", standing=MemberState.LEFT)], "k") is None


def test_standing_goes_before_speed():
    slow = candidate("slow", measured=1.0)
    suspect = candidate("suspect", measured=1e6, standing=MemberState.SUSPECT)
    failed = candidate("failed", measured=1e5, breaker=BreakerState.OPEN, cooldown=1.0)
    assert rank([suspect, failed, slow], "k").order == ("slow", "failed", "suspect")


def test_a_local_replica_comes_before_an_equal_one_a_hop_away():
    here, there = candidate("here", measured=50.0), candidate("there", measured=50.0, local=False)
    assert all(rank([there, here], str(key)).order == ("here", "there") for key in range(20))


def test_a_hop_is_worth_it_where_the_peer_is_faster():
    here, there = candidate("here", measured=50.0), candidate("there", measured=60.0, local=False)
    assert choose([here, there], "k") == "there"


def test_a_warm_replica_comes_before_an_equal_cold_one_and_not_before_a_faster_one():
    warm, cold = candidate("warm", speed=50.0), candidate("cold", speed=50.0, cold=True)
    assert all(rank([cold, warm], str(key)).order == ("warm", "cold") for key in range(20))
    faster = candidate("cold", speed=50.0 * (1 + 2 * COLD_PART), cold=True)
    assert choose([faster, warm], "k") == "cold"


def test_a_shared_prefix_counts_what_it_saves_against_the_queue():
    prompt = Demand(units=20.0, prompt_tokens=4000)
    has = candidate("has", measured=50.0, measured_prefill=1000.0, shared_tokens=3840, ahead=0.0)
    idle = candidate("idle", measured=50.0, measured_prefill=1000.0, ahead=0.0)
    assert all(choose([has, idle], str(key), prompt) == "has" for key in range(20))
    # 3.84 s of prefill saved are worth a wait of as long, and no longer.
    waiting = candidate("has", measured=50.0, measured_prefill=1000.0, shared_tokens=3840, ahead=3.9 * 50)
    assert choose([waiting, idle], "k", prompt) == "idle"


def test_ties_are_spread_over_calls_and_each_call_is_deterministic():
    twins = [candidate("a"), candidate("b")]
    firsts = [rank(twins, str(key)).order[0] for key in range(200)]
    assert 60 < firsts.count("a") < 140
    assert firsts == [rank(list(reversed(twins)), str(key)).order[0] for key in range(200)]


def test_a_replica_without_calls_is_taken_at_its_own_word_and_one_without_that_as_usual():
    fast, slow = candidate("fast", speed=58.0), candidate("slow", speed=10.0)
    assert all(rank([slow, fast], str(key)).order == ("fast", "slow") for key in range(20))
    assert usual_speed([fast, slow]) == pytest.approx(34.0)
    assert rank([slow, fast, candidate("silent")], "k").order == ("fast", "silent", "slow")
    assert predicted_seconds(candidate("a"), UNITS_PER_CALL, otherwise=usual_speed([])) == pytest.approx(1.0)


def test_what_calls_took_counts_more_than_the_replicas_own_word():
    assert predicted_seconds(candidate("a", measured=10.0, speed=1000.0), 30.0) == pytest.approx(3.0)


def test_a_call_is_as_large_as_it_says_else_as_calls_usually_are():
    known = [candidate("a", usual_units=10.0), candidate("b", usual_units=30.0), candidate("c")]
    assert units_of(known) == pytest.approx(20.0)
    assert units_of(known, Demand(most_units=5.0)) == pytest.approx(5.0)
    assert units_of(known, Demand(units=500.0)) == pytest.approx(500.0)
    assert units_of([candidate("c")]) == UNITS_PER_CALL


positive = st.floats(0.1, 1e4)
candidates = st.lists(
    st.builds(
        Candidate,
        replica=st.integers(0, 10**6).map(lambda number: ReplicaId(f"m@{number}")),
        model=st.just("m"),
        kind=st.just(ModelKind.CHAT),
        state=st.sampled_from(ReplicaState),
        node=st.integers(0, 5).map(lambda number: NodeId(str(number))),
        local=st.booleans(),
        standing=st.sampled_from(MemberState),
        active=st.integers(0, 50),
        queued=st.integers(0, 50),
        slots=st.integers(1, 8),
        speed=st.none() | positive,
        prefill_speed=st.none() | positive,
        ahead=st.none() | st.floats(0, 1e5),
        measured=st.none() | positive,
        measured_prefill=st.none() | positive,
        usual_units=st.none() | positive,
        cold=st.booleans(),
        breaker=st.sampled_from(BreakerState),
        cooldown=st.floats(0, 30),
        shared_tokens=st.floats(0, 1e4),
    ),
    max_size=12,
    unique_by=lambda each: each.replica,
)


@settings(max_examples=25)
@given(candidates, st.text(max_size=10), st.floats(0, 1e5), st.randoms(use_true_random=False))
def test_whatever_the_candidates_are(found, key, prompt_tokens, dice):
    demand = Demand(prompt_tokens=prompt_tokens)
    ranked = rank(found, key, demand)
    shuffled = list(found)
    dice.shuffle(shuffled)
    assert rank(shuffled, key, demand).order == ranked.order, "the order of the list must not matter"
    assert ranked.reasons.keys() == {each.replica for each in found}, "every candidate has its reason"
    by_name = {each.replica: each for each in found}
    chosen = [by_name[replica] for replica in ranked.order]
    assert all(each.state is ReplicaState.READY for each in chosen)
    assert not any(each.standing in (MemberState.DEAD, MemberState.LEFT) for each in chosen)
    standings = [standing_of(each) for each in chosen]
    assert standings == sorted(standings)
    assert len({standing == 3 for standing in standings}) <= 1, "draining nodes only where there is nobody else"
    otherwise = usual_speed(found)
    seconds = [predicted_seconds(each, ranked.units, prompt_tokens, otherwise) for each in chosen]
    for one, two, first, second in zip(standings, standings[1:], seconds, seconds[1:], strict=False):
        assert one < two or first <= second + 1e-8
