"""Reservations, learned speeds, and what a failure teaches."""

import heapq
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.health import COOLDOWN_MOST_SECONDS, BreakerState
from tars.core.mesh_messages import MemberState
from tars.core.prefix_affinity import BLOCK_CHARACTERS, blocks_of
from tars.core.replica_ledger import (
    MEASURED_SECONDS,
    MOST_BOOKS,
    TOLD_HALF_LIFE_SECONDS,
    WARM_SECONDS,
    Observation,
    ReplicaLedger,
)
from tars.core.routing import Candidate, Demand
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState


def candidate(name, **more):
    made = Candidate(ReplicaId(name), "m", ModelKind.CHAT, ReplicaState.READY, node=NodeId(f"node-{name}"), speed=50.0)
    return replace(made, **more)


def burst(ledger, candidates, calls, now=0.0, **more):
    made = [ledger.choose(candidates, f"call-{number}", now, **more).reservation for number in range(calls)]
    return made, Counter(each.replica for each in made)


# --- no herding -----------------------------------------------------------------------------------------------------


def test_a_hundred_calls_at_once_over_four_equal_replicas_spread_evenly():
    _, counts = burst(ReplicaLedger(), [candidate(name, local=False) for name in "abcd"], 100)
    assert sorted(counts.values()) == [25, 25, 25, 25]


@settings(max_examples=25)
@given(st.integers(2, 8), st.integers(1, 120), st.integers(1, 8))
def test_equal_replicas_never_differ_by_more_than_one_call(replicas, calls, slots):
    _, counts = burst(ReplicaLedger(), [candidate(str(number), slots=slots) for number in range(replicas)], calls)
    each = [counts[ReplicaId(str(number))] for number in range(replicas)]
    assert sum(each) == calls
    assert max(each) - min(each) <= 1


def test_a_replica_of_half_the_speed_gets_about_half():
    _, counts = burst(ReplicaLedger(), [candidate("fast", speed=100.0), candidate("slow", speed=50.0)], 90)
    assert 58 <= counts["fast"] <= 62


def test_a_replica_with_twice_the_slots_gets_about_twice_as_many():
    _, counts = burst(ReplicaLedger(), [candidate("wide", slots=8), candidate("narrow", slots=4)], 90)
    assert 57 <= counts["wide"] <= 63


def test_large_calls_weigh_more_than_small_ones():
    ledger, both = ReplicaLedger(), [candidate("a"), candidate("b")]
    first = ledger.choose(both, "k", 0.0, Demand(units=500.0)).reservation
    _, counts = burst(ledger, both, 400, demand=Demand(units=1.0))
    assert counts == {({"a", "b"} - {first.replica}).pop(): 400}


def test_choosing_is_deterministic():
    def choices():
        return burst(ReplicaLedger(), [candidate(name) for name in "abc"], 50)[1]

    assert choices() == choices()


def test_what_ended_frees_its_place_once():
    ledger, only = ReplicaLedger(), [candidate("a")]
    made, _ = burst(ledger, only, 3)
    assert ledger.in_flight(ReplicaId("a")) == 3
    for reservation in [*made, *made]:
        ledger.release(reservation, 1.0)
    assert ledger.in_flight(ReplicaId("a")) == 0
    assert ledger.annotated(only[0], 1.0).ahead == 0.0


def test_those_who_were_tried_are_not_chosen_again():
    ledger, both = ReplicaLedger(), [candidate("a"), candidate("b")]
    first = ledger.choose(both, "k", 0.0).reservation.replica
    second = ledger.choose(both, "k", 0.0, without={first}).reservation.replica
    assert {first, second} == {"a", "b"}
    assert ledger.choose(both, "k", 0.0, without={first, second}).reservation is None


def test_a_draining_node_is_asked_once_all_others_were():
    ledger = ReplicaLedger()
    both = [candidate("draining", standing=MemberState.DRAINING), candidate("other", standing=MemberState.SUSPECT)]
    assert ledger.choose(both, "k", 0.0).reservation.replica == "other"
    assert ledger.choose(both, "k", 0.0, without={"other"}).reservation.replica == "draining"


def mean_seconds(pick, replicas, seed, calls=600, every=0.4, tokens=100.0):
    """Mean time of calls that come at random, each replica serving `slots` of them at once, each at its true speed.

    `pick(number, now)` -> (replica's place, ended), `ended(now, seconds)` is told when the call is done.
    """
    dice = random.Random(seed)
    free = [[0.0] * slots for _, slots in replicas]
    now, total, ends = 0.0, 0.0, []
    for number in range(calls):
        now += dice.expovariate(1 / every)
        while ends and ends[0][0] <= now:
            at, _, decode, ended = heapq.heappop(ends)
            ended(at, decode)
        place, ended = pick(number, now)
        speed, _ = replicas[place]
        asked = dice.uniform(0.2, 1.8) * tokens
        slot = min(range(len(free[place])), key=free[place].__getitem__)
        done = max(now, free[place][slot]) + asked / speed
        free[place][slot] = done
        total += done - now
        heapq.heappush(ends, (done, number, (asked, asked / speed), ended))
    return total / calls


@pytest.mark.parametrize("told", [True, False], ids=["speeds told", "speeds learned"])
def test_on_unlike_pcs_answers_come_sooner_than_from_whoever_has_the_fewest_calls(told):
    """A 4090, a 3060 and a CPU, at two thirds of what they can do together; no replica says how large its calls will be."""
    replicas = [(150.0, 2), (53.0, 2), (11.0, 2)]

    def fewest():
        running = [0] * len(replicas)

        def pick(number, now):
            place = min(range(len(replicas)), key=lambda each: (running[each] / replicas[each][1], (number + each) % 3))
            running[place] += 1

            def ended(at, decode):
                running[place] -= 1

            return place, ended

        return pick

    def ledger():
        kept = ReplicaLedger()
        offered = [
            candidate(str(place), speed=speed if told else None, slots=slots)
            for place, (speed, slots) in enumerate(replicas)
        ]

        def pick(number, now):
            reservation = kept.choose(offered, str(number), now).reservation

            def ended(at, decode):
                asked, seconds = decode
                kept.learn(reservation, Observation(asked, seconds, waited=False), at)
                kept.release(reservation, at)

            return int(reservation.replica), ended

        return pick

    for seed in range(3):
        ours, theirs = mean_seconds(ledger(), replicas, seed), mean_seconds(fewest(), replicas, seed)
        assert ours < 0.75 * theirs


# --- queues ---------------------------------------------------------------------------------------------------------


def test_a_peers_queue_counts_without_the_calls_that_came_from_here_and_fades():
    ledger, one = ReplicaLedger(), candidate("a", local=False)
    burst(ledger, [one], 2, demand=Demand(units=10.0))
    ledger.told([("a", 4, 2)], 0.0)
    own = 20.0
    fresh = ledger.annotated(one, 0.0).ahead
    assert fresh == pytest.approx(own + 4 * 128)
    later = ledger.annotated(one, TOLD_HALF_LIFE_SECONDS).ahead
    assert later == pytest.approx(own + 2 * 128)
    ledger.told([("a", 2, 0)], TOLD_HALF_LIFE_SECONDS)
    assert ledger.annotated(one, TOLD_HALF_LIFE_SECONDS).ahead == pytest.approx(own)


def test_a_replica_here_says_itself_what_others_sent_it():
    ledger = ReplicaLedger()
    burst(ledger, [candidate("a")], 2, demand=Demand(units=10.0))
    assert ledger.annotated(candidate("a", active=1, queued=1), 0.0).ahead == pytest.approx(20.0)
    assert ledger.annotated(candidate("a", active=2, queued=1), 0.0).ahead == pytest.approx(20.0 + 128)


# --- speeds ---------------------------------------------------------------------------------------------------------


def answered(ledger, one, now, seen, units=None):
    reservation = ledger.choose([one], "k", now, Demand(units=units)).reservation
    ledger.learn(reservation, seen, now)
    ledger.release(reservation, now)


def test_what_was_measured_replaces_the_replicas_own_word_until_it_is_old():
    ledger, one = ReplicaLedger(), candidate("a", speed=1000.0)
    for second in range(40):
        answered(ledger, one, float(second), Observation(units=100.0, seconds=2.0), units=100.0)
    assert ledger.annotated(one, 40.0).measured == pytest.approx(50.0)
    assert ledger.annotated(one, 40.0).usual_units == pytest.approx(100.0)
    assert ledger.annotated(one, 40.0 + MEASURED_SECONDS).measured is None


def test_many_calls_of_one_text_do_not_hide_how_fast_a_thousand_go():
    ledger, one = ReplicaLedger(), candidate("a")
    for second in range(20):
        answered(ledger, one, float(second), Observation(1.0, 0.01), units=1.0)
        answered(ledger, one, float(second), Observation(1000.0, 1.0), units=1000.0)
    assert ledger.annotated(one, 20.0).measured > 900


def test_a_speed_seen_in_a_crowd_is_that_of_a_call_alone():
    """A call that waited behind nine equal ones took ten times as long; the replica is no slower for it."""
    ledger, one = ReplicaLedger(), candidate("a", slots=1)
    made, _ = burst(ledger, [one], 10, demand=Demand(units=100.0))
    ledger.learn(made[-1], Observation(100.0, 20.0), 20.0)
    assert ledger.annotated(one, 20.0).measured == pytest.approx(50.0)


def test_decoding_in_a_crowd_is_slowed_by_those_in_the_slots_only():
    ledger, one = ReplicaLedger(), candidate("a", slots=4)
    made, _ = burst(ledger, [one], 10)
    ledger.learn(made[-1], Observation(100.0, 3.5, waited=False), 20.0)
    assert ledger.annotated(one, 20.0).measured == pytest.approx(50.0)


def test_the_way_to_a_peer_is_no_part_of_its_speed():
    ledger, one = ReplicaLedger(), candidate("a", local=False)
    reservation = ledger.choose([one], "k", 0.0, Demand(units=1.0)).reservation
    ledger.learn(reservation, Observation(1.0, 0.0115), 0.0, hop_seconds=0.0015)
    assert ledger.annotated(one, 0.0).measured == pytest.approx(100.0)


def test_prefill_is_measured_apart():
    ledger, one = ReplicaLedger(), candidate("a")
    seen = Observation(99.0, 2.0, asked=100.0, waited=False, prefill_tokens=500.0, prefill_seconds=0.25)
    answered(ledger, one, 0.0, seen)
    known = ledger.annotated(one, 0.0)
    assert known.measured_prefill == pytest.approx(2000.0)
    assert known.usual_units == pytest.approx(100.0)


# --- warm, breakers, prefixes ------------------------------------------------------------------------------------------


def test_a_replica_is_warm_while_it_is_used_and_a_minute_longer():
    ledger, one = ReplicaLedger(), candidate("a")
    assert ledger.annotated(one, 0.0).cold
    reservation = ledger.choose([one], "k", 0.0).reservation
    assert not ledger.annotated(one, 0.0).cold
    ledger.release(reservation, 5.0)
    assert not ledger.annotated(one, 5.0 + WARM_SECONDS).cold
    assert ledger.annotated(one, 5.1 + WARM_SECONDS).cold
    ledger.told([("a", 1, 0)], 100.0)
    assert not ledger.annotated(one, 100.0).cold


def test_who_failed_is_asked_last_for_a_while_longer_each_time_and_an_answer_forgives():
    ledger, one, other = ReplicaLedger(), candidate("a"), candidate("b", speed=1.0)
    ledger.failed(one.replica, 2.0, 0.0)
    assert ledger.choose([one, other], "k", 1.9).reservation.replica == "b"
    assert ledger.choose([one, other], "k", 2.1).reservation.replica == "a"
    ledger.failed(one.replica, 2.0, 10.0)
    assert ledger.annotated(one, 10.0).breaker is BreakerState.OPEN
    assert ledger.annotated(one, 10.0).cooldown == pytest.approx(4.0)
    for number in range(20):
        ledger.failed(one.replica, 2.0, 100.0 * (number + 1))
    assert ledger.annotated(one, 2000.0).cooldown == pytest.approx(COOLDOWN_MOST_SECONDS)
    answered(ledger, one, 2001.0, Observation(1.0, 1.0))
    assert ledger.annotated(one, 2001.0).breaker is BreakerState.CLOSED


def test_one_call_finds_out_whether_it_works_again_and_the_others_go_elsewhere_meanwhile():
    ledger, one, other = ReplicaLedger(), candidate("a"), candidate("b", speed=1.0)
    ledger.failed(one.replica, 2.0, 0.0)
    probe = ledger.choose([one, other], "k", 3.0).reservation
    assert (probe.replica, probe.probe) == ("a", True)
    assert {ledger.choose([one, other], f"k{number}", 3.1).reservation.replica for number in range(9)} == {"b"}
    assert "finding out" in ledger.choose([one, other], "k", 3.1).ranked.reasons["a"]
    ledger.began(probe)
    assert ledger.breaker(one.replica, 3.2) is BreakerState.CLOSED, "the first token is enough"
    assert ledger.choose([one, other], "k", 3.2).reservation.replica == "a"


def test_a_token_from_one_that_was_only_late_closes_its_breaker_and_of_one_that_is_full_does_not():
    ledger, late, full = ReplicaLedger(), candidate("a"), candidate("b")
    ledger.failed(late.replica, 2.0, 0.0, late=True)
    ledger.failed(full.replica, 2.0, 0.0)
    for each in (late, full):
        ledger.heard(each.replica)
    assert ledger.breaker(late.replica, 0.1) is BreakerState.CLOSED
    assert ledger.breaker(full.replica, 0.1) is BreakerState.OPEN


def test_a_probe_whose_caller_left_leaves_the_place_to_the_next_one():
    ledger, one, other = ReplicaLedger(), candidate("a"), candidate("b", speed=1.0)
    ledger.failed(one.node, 2.0, 0.0)
    probe = ledger.choose([one, other], "k", 3.0).reservation
    assert probe.probe
    ledger.release(probe, 3.5)
    assert ledger.choose([one, other], "k", 3.5).reservation.replica == "a"


def test_a_node_that_was_not_reached_is_asked_last_with_all_of_its_replicas():
    ledger = ReplicaLedger()
    ledger.failed(NodeId("big"), 5.0, 0.0)
    assert ledger.annotated(candidate("x", node=NodeId("big")), 0.0).cooldown == pytest.approx(5.0)
    assert ledger.annotated(candidate("y", node=NodeId("big")), 0.0).cooldown == pytest.approx(5.0)
    assert ledger.annotated(candidate("z", node=NodeId("small")), 0.0).breaker is BreakerState.CLOSED
    ledger.works(NodeId("big"))
    assert ledger.annotated(candidate("x", node=NodeId("big")), 0.0).breaker is BreakerState.CLOSED


def test_a_choice_says_when_its_first_token_and_its_end_are_expected():
    ledger = ReplicaLedger()
    one = candidate("a", prefill_speed=1000.0, active=1)
    made = ledger.choose([one], "k", 0.0, Demand(units=100.0, prompt_tokens=500.0)).reservation
    assert made.predicted_first == pytest.approx(128 / 50 + 0.5)
    assert made.predicted == pytest.approx(made.predicted_first + 100 / 50)


def test_the_only_replica_is_asked_even_if_it_failed_a_moment_ago():
    ledger = ReplicaLedger()
    ledger.failed(ReplicaId("a"), 2.0, 0.0)
    assert ledger.choose([candidate("a")], "k", 0.0).reservation.replica == "a"


def test_chats_that_share_a_prefix_stay_together_until_the_queue_costs_more():
    ledger = ReplicaLedger()
    replicas = [candidate(name, prefill_speed=500.0, cache_tokens=8192) for name in "abc"]
    system = "You are the help desk of a large company. " * 200
    prompt = Demand(units=50.0, prompt_tokens=len(system) / 4)
    places = []
    for number in range(12):
        blocks = blocks_of(system + f"question {number} " * 20)
        reservation = ledger.choose(replicas, f"call-{number}", float(number), prompt, blocks).reservation
        places.append(reservation.replica)
        ledger.release(reservation, number + 0.5)
    assert len(set(places)) == 1
    blocks = blocks_of(system)
    made = [ledger.choose(replicas, f"burst-{n}", 20.0, prompt, blocks).reservation.replica for n in range(12)]
    assert set(made) == {"a", "b", "c"}, "4 s of prefill are not worth a queue of twelve"


def test_a_replica_whose_worker_started_anew_has_no_prefixes():
    ledger, one = ReplicaLedger(), candidate("a")
    blocks = blocks_of("x" * BLOCK_CHARACTERS * 4)
    ledger.release(ledger.choose([one], "k", 0.0, blocks=blocks).reservation, 0.0)
    assert ledger.annotated(one, 0.0, blocks).shared_tokens > 0
    ledger.cache_lost(one.replica)
    assert ledger.annotated(one, 0.0, blocks).shared_tokens == 0


def test_what_is_kept_is_bounded_and_calls_in_flight_are_never_forgotten():
    ledger, busy = ReplicaLedger(), candidate("busy")
    reservation = ledger.choose([busy], "k", 0.0).reservation
    for number in range(MOST_BOOKS + 50):
        ledger.told([(f"r{number}", 1, 0)], 0.0)
        ledger.failed(ReplicaId(f"r{number}"), 1.0, 0.0)
    assert ledger.in_flight(busy.replica) == 1
    assert len(ledger._books) <= MOST_BOOKS
    assert len(ledger._breakers) <= MOST_BOOKS
    ledger.release(reservation, 1.0)
    assert ledger.in_flight(busy.replica) == 0


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from(["choose", "release", "learn", "fail", "told"]), st.integers(0, 5), st.floats(0, 9)),
        max_size=60,
    )
)
def test_whatever_happens_places_are_counted_right_and_predictions_are_numbers(events):
    ledger = ReplicaLedger()
    replicas = [candidate(str(number), local=number % 2 == 0, standing=MemberState.ALIVE) for number in range(3)]
    made, now = [], 0.0
    for what, number, amount in events:
        now += amount
        match what:
            case "choose":
                made.append(ledger.choose(replicas, str(number), now, Demand(units=amount)).reservation)
            case "release" if made:
                ledger.release(made[number % len(made)], now)
            case "learn" if made:
                ledger.learn(made[number % len(made)], Observation(amount, amount), now, 0.0015)
            case "fail":
                ledger.failed(replicas[number % 3].replica, amount, now)
            case "told":
                ledger.told([(str(number % 3), number, number)], now)
        for each in replicas:
            assert ledger.in_flight(each.replica) == sum(one.open for one in made if one.replica == each.replica)
            known = ledger.annotated(each, now)
            assert 0 <= known.ahead < 1e9
            assert known.measured is None or known.measured > 0
            assert 0 <= known.cooldown <= COOLDOWN_MOST_SECONDS
