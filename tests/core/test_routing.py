"""Ranking replicas."""

import pytest

from tars.core.routing import UNITS_PER_CALL, Candidate, predicted_seconds, rank, units_per_call
from tars.core.types import ModelKind, ReplicaId, ReplicaState


def candidate(name, state=ReplicaState.READY, **more):
    return Candidate(ReplicaId(name), "m", ModelKind.CHAT, state, **more)


def test_the_replica_that_would_be_done_first_comes_first():
    busy = candidate("busy", active=1, queued=3, seconds_per_call=0.1)
    slow = candidate("slow", seconds_per_call=5.0)
    idle = candidate("idle", seconds_per_call=0.2)
    assert rank([busy, slow, idle], "key").order == ("idle", "busy", "slow")


def test_ten_and_fifty_eight_tokens_a_second_do_not_rank_equal():
    fast, slow = candidate("fast", seconds_per_call=1.0), candidate("slow", seconds_per_call=5.8)
    assert all(rank([slow, fast], str(key)).order[0] == "fast" for key in range(20))


def test_more_slots_shorten_the_wait():
    assert predicted_seconds(candidate("a", active=4, slots=4)) < predicted_seconds(candidate("b", active=4, slots=1))


def test_only_ready_replicas_are_ranked_and_the_others_say_why():
    ranked = rank([candidate("a"), candidate("b", ReplicaState.LOADING)], "key")
    assert ranked.order == ("a",)
    assert ranked.reasons["b"] == "not ready: loading"
    assert ranked.reasons["a"].startswith("rank 1")


def test_ties_are_spread_over_calls_and_each_call_is_deterministic():
    twins = [candidate("a"), candidate("b")]
    firsts = [rank(twins, str(key)).order[0] for key in range(200)]
    assert 60 < firsts.count("a") < 140
    assert firsts == [rank(list(reversed(twins)), str(key)).order[0] for key in range(200)]


def test_a_cold_replica_is_taken_at_its_own_measured_speed():
    fast, slow = candidate("fast", speed=58.0), candidate("slow", speed=10.0)
    assert all(rank([slow, fast], str(key)).order == ("fast", "slow") for key in range(20))
    assert predicted_seconds(candidate("a", speed=UNITS_PER_CALL)) == pytest.approx(1.0)


def test_a_cold_and_a_warm_replica_are_compared_for_the_same_call():
    # Calls here are short: 10 tokens at 100 tokens/s. A cold replica of 50 tokens/s needs twice as long, not UNITS_PER_CALL / 50.
    warm = candidate("warm", seconds_per_call=0.1, speed=100.0)
    assert units_per_call([warm, candidate("cold", speed=50.0)]) == pytest.approx(10)
    assert rank([candidate("cold", speed=50.0), warm], "key").order == ("warm", "cold")
    waiting = candidate("warm", seconds_per_call=0.1, speed=100.0, active=2)
    assert rank([candidate("cold", speed=50.0), waiting], "key").order == ("cold", "warm")


def test_what_a_call_takes_counts_more_than_what_was_measured_at_load():
    measured = candidate("a", seconds_per_call=3.0, speed=1000.0)
    assert predicted_seconds(measured) == 3.0
