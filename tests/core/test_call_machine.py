"""A call's machine: each rule by itself, then any fleet under any faults."""

import itertools
import random
from dataclasses import replace
from heapq import heappop, heappush
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars.core.call_effects import (
    DEADLINE,
    NO_REPLICA,
    Answer,
    AskToLoad,
    CallShape,
    Fail,
    Failure,
    Start,
    Stop,
    Wake,
)
from tars.core.call_machine import HOPE_SECONDS, LOOK_SECONDS, CallMachine
from tars.core.hedging import EXTRA_PART
from tars.core.learned_deadlines import GAP_UNKNOWN_SECONDS
from tars.core.mesh_messages import MemberState
from tars.core.replica_ledger import Observation
from tars.core.routing import HOP_SECONDS, Candidate, Demand
from tars.core.routing_state import RoutingState
from tars.core.types import ModelKind, NodeId, ReplicaId, ReplicaState

CRASHED = Failure("worker_crashed", sent=True)
FULL = Failure("overloaded", retry_after=0.2)
DRAINED = Failure("draining", known=True)


def replica(name, state=ReplicaState.READY, *, file="f", **more):
    return Candidate(
        ReplicaId(name),
        "m",
        ModelKind.CHAT,
        state,
        node=NodeId(f"node-{name}"),
        local=False,
        speed=50.0,
        file_sha256=file,
        **more,
    )


class Call:
    """One call, its fleet, and what its machine wanted."""

    def __init__(self, *fleet, streams=True, deadline=60.0, state=None, **shape):
        self.fleet = list(fleet)
        self.state = state or RoutingState()
        shape = CallShape("key", "m", deadline, streams, demand=Demand(units=4.0), **shape)
        self.machine = CallMachine(shape, self.state, lambda: self.fleet, random.Random(1))
        self.effects = []
        self.wake = inf
        self.now = 0.0

    def told(self, effects):
        self.effects = list(effects)
        for each in effects:
            if isinstance(each, Wake):
                self.wake = each.at
        return self.effects

    def begin(self):
        return self.told(self.machine.begin(self.now))

    def tokens(self, attempt, *ids, index=0):
        return self.told(self.machine.tokens(attempt, index, list(ids), self.now))

    def failed(self, attempt, failure):
        return self.told(self.machine.failed(attempt, failure, self.now))

    def finished(self, attempt):
        return self.told(self.machine.finished(attempt, Observation(4.0, 0.1), self.now))

    def until_wake(self):
        """The time of the last `Wake` comes."""
        self.now, self.wake = self.wake, inf
        return self.told(self.machine.tick(self.now))

    def until(self, kind):
        """Time goes on until there is such an effect."""
        for _ in range(1000):
            if found := [each for each in self.effects if isinstance(each, kind)]:
                return found[0]
            assert self.wake < inf, f"waits for ever: {self.effects}"
            self.until_wake()
        raise AssertionError(f"no {kind.__name__}")

    def started(self):
        (start,) = [each for each in self.effects if isinstance(each, Start)]
        return start.reservation.replica, start.resume


def plain(effects):
    return [each for each in effects if not isinstance(each, Wake)]


# --- before the first token ---------------------------------------------------------------------------------------------


def test_a_call_that_is_answered_leaves_nothing_behind():
    call = Call(replica("a"))
    call.begin()
    assert call.started() == ("a", None)
    assert call.effects[0].file_sha256 == "f"
    call.tokens(0, 5, 6)
    assert call.finished(0) == [Answer(0)]
    assert call.state.ledger.in_flight(ReplicaId("a")) == 0
    assert [each.outcome for each in call.machine.attempts] == ["answered"]
    assert call.machine.attempts[0].tokens == 2
    assert call.machine.tick(99.0) == call.machine.fleet_changed(99.0) == call.machine.cancelled(99.0) == ()


def test_the_next_ranked_replica_is_asked_at_once():
    call = Call(replica("a"), replica("b"))
    call.begin()
    first = call.started()[0]
    call.failed(0, Failure("still_loading"))
    assert call.started()[0] != first
    assert call.machine.attempts[1].reason.startswith("after still_loading; rank 1")


def test_a_callers_own_mistake_is_never_tried_again():
    call = Call(replica("a"), replica("b"))
    call.begin()
    wrong = Failure("bad_grammar", retryable=False, callers_fault=True)
    assert call.failed(0, wrong) == [Fail(wrong)]


def test_when_everybody_was_tried_it_waits_with_growing_jitter_and_asks_all_again():
    call = Call(replica("a"), replica("b"))
    call.begin()
    for number in (0, 1):
        call.failed(number, Failure("stale_route"))
    waits = []
    for number in range(2, 20, 2):
        began = call.now
        call.until(Start)
        waits.append(call.now - began)
        call.failed(number, Failure("stale_route"))
        call.failed(number + 1, Failure("stale_route"))
    assert all(0 <= wait <= 2.0 for wait in waits)
    assert max(waits[:2]) <= 0.1
    assert max(waits) > 0.5


def test_retry_after_is_honoured():
    call = Call(replica("a"))
    call.begin()
    call.failed(0, Failure("overloaded", retry_after=3.0))
    call.until(Start)
    assert 3.0 <= call.now < 3.1


def test_a_retry_after_beyond_the_deadline_fails_now_rather_than_late():
    call = Call(replica("a"), deadline=2.0)
    call.begin()
    full = Failure("overloaded", retry_after=3.0)
    assert plain(call.failed(0, full)) == [Fail(full)]


def test_what_a_call_is_told_is_the_word_of_who_is_there_and_not_that_of_who_died_since():
    call = Call(replica("a"), replica("b"), deadline=20.0)
    call.begin()
    full, lost = Failure("overloaded", retry_after=30.0), Failure("peer_unreachable")
    first = call.started()[0]
    call.failed(0, full)
    assert call.started()
    call.fleet = [each for each in call.fleet if each.replica == first]
    assert plain(call.failed(1, lost)) == [Fail(full)]


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.RESTARTING])
def test_a_replica_that_loads_is_waited_for_where_those_that_are_ready_are_too_full(state):
    call = Call(replica("a"), deadline=20.0)
    call.begin()
    call.fleet.append(replica("b", state))
    assert plain(call.failed(0, Failure("overloaded", retry_after=30.0))) == []
    for _ in range(3):
        call.until_wake()
        assert plain(call.effects) == []
    assert call.now <= 4.0
    call.fleet[1] = replica("b")
    call.told(call.machine.fleet_changed(call.now))
    assert call.started() == ("b", None)


@pytest.mark.parametrize(("deadline", "until"), [(60.0, HOPE_SECONDS), (6.0, 6.0 - LOOK_SECONDS)])
def test_one_that_loads_for_too_long_is_not_waited_for_until_it_is_late(deadline, until):
    call = Call(replica("a"), replica("b", ReplicaState.LOADING), deadline=deadline)
    call.begin()
    full = Failure("overloaded", retry_after=90.0)
    call.failed(0, full)
    assert call.until(Fail).failure == full, "and not that its time is over: when to come back is said"
    assert call.now == pytest.approx(until)


@pytest.mark.parametrize("state", [ReplicaState.FAILED, ReplicaState.STOPPING, ReplicaState.STOPPED])
def test_one_that_does_not_come_is_not_waited_for(state):
    call = Call(replica("a"), replica("b", state), deadline=20.0)
    call.begin()
    full = Failure("overloaded", retry_after=30.0)
    assert plain(call.failed(0, full)) == [Fail(full)]


def test_without_budget_an_overload_is_told_to_the_caller_and_a_dead_peer_is_not():
    call = Call(replica("a"), replica("b"))
    while call.state.retries.may_retry():
        pass
    call.begin()
    assert plain(call.failed(0, FULL)) == [Fail(FULL)]
    call = Call(replica("a"), replica("b"), state=call.state)
    call.begin()
    call.failed(0, Failure("peer_unreachable"))
    assert call.started()


def test_what_killed_two_workers_is_not_given_to_a_third():
    call = Call(*(replica(name) for name in "abc"))
    call.begin()
    call.failed(0, CRASHED)
    assert call.started()
    assert plain(call.failed(1, CRASHED)) == [Fail(CRASHED)]


def test_nobody_has_it_so_it_is_loaded_and_waited_for():
    call = Call()
    assert plain(call.begin()) == [AskToLoad()]
    call.until_wake()
    assert plain(call.effects) == []  # it was asked for once
    call.fleet = [replica("a", ReplicaState.LOADING)]
    assert plain(call.told(call.machine.fleet_changed(call.now))) == []
    call.fleet = [replica("a")]
    call.told(call.machine.fleet_changed(call.now))
    assert call.started() == ("a", None)


def test_a_change_of_the_fleet_that_nobody_told_is_seen_within_a_second():
    call = Call()
    call.begin()
    call.fleet = [replica("a")]
    call.until(Start)
    assert call.now <= 1.0


def test_what_cannot_be_loaded_fails_with_the_reason():
    call = Call()
    call.begin()
    why = Failure("does_not_fit", retryable=False)
    assert plain(call.told(call.machine.refused_to_load(why, 0.1))) == [Fail(why)]


def test_the_deadline_ends_it_whatever_runs():
    call = Call(replica("a"), deadline=1.0)
    call.begin()
    call.now = 1.0
    assert plain(call.told(call.machine.tick(1.0))) == [Stop(0), Fail(DEADLINE)]
    assert call.state.ledger.in_flight(ReplicaId("a")) == 0


def test_a_caller_who_leaves_frees_the_replica_at_once():
    call = Call(replica("a"))
    call.begin()
    assert call.told(call.machine.cancelled(0.5)) == [Stop(0)]
    assert call.state.ledger.in_flight(ReplicaId("a")) == 0
    assert call.machine.attempts[0].outcome == "cancelled"


# --- forwarded calls ----------------------------------------------------------------------------------------------------


def test_a_forwarded_call_is_asked_of_each_own_replica_once_and_never_waits():
    call = Call(replica("a"), replica("b"), forwarded=True)
    call.begin()
    call.failed(0, FULL)
    assert call.started()
    assert call.failed(1, FULL) == [Fail(FULL)]
    assert Call(forwarded=True).begin() == [Fail(NO_REPLICA)]


def test_a_forwarded_call_that_ran_is_its_gateways_to_continue():
    call = Call(replica("a"), replica("b"), forwarded=True)
    call.begin()
    call.tokens(0, 1)
    assert call.failed(0, DRAINED) == [Fail(DRAINED)]
    call = Call(replica("a"), replica("b"), forwarded=True)
    call.begin()
    assert call.failed(0, CRASHED) == [Fail(CRASHED)]


def test_a_forwarded_call_is_not_given_up_as_late_and_costs_no_budget():
    call = Call(replica("a"), replica("b"), forwarded=True)
    before = call.state.retries.saved
    call.begin()
    call.tokens(0, 1)
    assert call.wake == 60.0
    assert call.state.retries.saved == before


# --- after the first token ----------------------------------------------------------------------------------------------


def test_a_broken_answer_goes_on_with_its_tokens_where_the_same_file_is():
    call = Call(replica("a"), replica("b", file="another"))
    call.begin()
    attempt = call.until(Start).attempt
    first, _ = call.started()
    call.tokens(attempt, 11, 12)
    call.tokens(attempt, 13)
    call.fleet.append(replica("c", file=next(each.file_sha256 for each in call.fleet if each.replica == first)))
    call.failed(attempt, DRAINED)
    assert call.started() == ("c", ((11, 12, 13),))
    assert call.machine.attempts[1].because == "continued after draining"
    call.tokens(1, 14)
    call.fleet.append(replica("d", file=call.fleet[-1].file_sha256))
    call.failed(1, CRASHED)
    assert call.started()[1] == ((11, 12, 13, 14),)
    assert call.machine.continuations == 2


def test_several_answers_go_on_each_with_its_own_tokens():
    call = Call(replica("a"), replica("b"), answers=2)
    call.begin()
    call.tokens(0, 1, index=1)
    call.tokens(0, 2, 3, index=0)
    call.failed(0, Failure("peer_unreachable", sent=True, known=True))
    assert call.started()[1] == ((2, 3), (1,))


def test_a_saved_state_goes_into_the_next_start_only():
    call = Call(replica("a"), replica("b"), replica("c"))
    call.begin()
    call.tokens(0, 1)
    call.failed(0, Failure("draining", known=True, saved="the state"))
    assert call.until(Start).saved == "the state"
    call.failed(1, Failure("stale_route"))
    assert call.until(Start).saved is None
    assert call.started()[1] == ((1,),)


def test_a_state_that_was_saved_before_the_first_token_does_not_go_to_another_file():
    call = Call(replica("a"), replica("b", file="another"))
    call.begin()
    call.failed(0, Failure("draining", known=True, saved="the state"))
    assert call.until(Start).saved is None
    assert call.started()[1] is None


def test_what_nobody_has_seen_is_begun_anew_in_another_file_rather_than_waited_for():
    call = Call(replica("a"), shown=False)
    call.begin()
    call.tokens(0, 1, 2)
    call.fleet = [replica("a", ReplicaState.RESTARTING), replica("b", file="another")]
    call.failed(0, CRASHED)
    assert call.started() == ("b", None)
    assert call.machine.attempts[1].because == "begun anew after worker_crashed"
    call.tokens(1, 7)
    call.fleet.append(replica("c", file="another"))
    call.failed(1, DRAINED)
    assert call.started() == ("c", ((7,),))
    assert call.until(Start).file_sha256 == "another"


def test_what_nobody_has_seen_leaves_a_replica_that_fell_silent_for_another_file_too():
    call = Call(replica("a"), shown=False, state=taught("a", "b"))
    call.begin()
    call.tokens(0, 1)
    call.fleet.append(replica("b", file="another"))
    call.until(Stop)
    assert call.now < 1.3
    assert call.started() == ("b", None)


def test_a_forwarded_continuation_goes_on_only_in_the_file_that_its_gateway_names():
    call = Call(replica("a", file="one"), replica("b", file="another"), forwarded=True, file_sha256="another")
    call.begin()
    assert call.started()[0] == "b"
    stale = Call(replica("a", file="one"), forwarded=True, file_sha256="another")
    assert stale.begin() == [Fail(NO_REPLICA)]


def test_a_continuation_waits_for_a_worker_that_is_restarted():
    call = Call(replica("a"))
    call.begin()
    call.tokens(0, 1)
    call.fleet = [replica("a", ReplicaState.RESTARTING), replica("b", file="another")]
    assert plain(call.failed(0, CRASHED)) == [AskToLoad()]
    call.fleet[0] = replica("a")
    call.now = 2.0
    call.told(call.machine.fleet_changed(2.0))
    assert call.started() == ("a", ((1,),))


def test_many_breaks_in_one_call_are_survived_as_long_as_it_gets_on():
    call = Call(*(replica(name) for name in "abc"), deadline=1e4)
    call.begin()
    for number in range(50):
        attempt = call.until(Start).attempt
        call.tokens(attempt, number)
        call.failed(attempt, Failure("peer_unreachable", sent=True, known=True))
    assert call.started()[1] == (tuple(range(50)),)


def test_a_call_whose_caller_has_tokens_is_not_shed():
    call = Call(replica("a"), replica("b"))
    while call.state.retries.may_retry():
        pass
    call.begin()
    call.tokens(0, 1)
    call.failed(0, DRAINED)
    call.failed(1, FULL)
    call.until(Start)
    assert call.started()[1] == ((1,),)


def test_what_comes_from_an_attempt_that_ended_counts_for_nothing():
    call = Call(replica("a"), replica("b"))
    call.begin()
    call.tokens(0, 1)
    call.failed(0, DRAINED)
    assert call.tokens(0, 2) == call.finished(0) == call.failed(0, CRASHED) == []
    call.failed(1, DRAINED)
    call.until(Start)
    assert call.started()[1] == ((1,),)


# --- late ---------------------------------------------------------------------------------------------------------------


def taught(*names, gap=0.02, first=0.1):
    state = RoutingState()
    for name in names:
        for number in range(40):
            state.deadlines.saw_gap(ReplicaId(name), gap, number * 0.1)
            state.deadlines.saw_first_token(ReplicaId(name), first, 0.0, number * 0.1)
    return state


def test_a_stream_that_falls_silent_goes_on_elsewhere_after_the_learned_gap():
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    call.now = 5.0
    call.tokens(0, 1)
    call.until(Stop)
    assert 6.0 <= call.now < 6.2
    assert call.started()[1] == ((1,),)
    assert call.machine.attempts[0].outcome == "late"


def test_the_first_stream_of_a_replica_learns_its_own_gap_as_it_goes():
    call = Call(replica("a"), replica("b"))
    call.begin()
    for number in range(5):
        call.now = 0.02 * number
        call.tokens(0, number)
    call.until(Stop)
    assert 1.0 <= call.now < 1.3, "nobody had measured it before"


def test_one_that_was_late_for_a_call_and_gives_tokens_to_others_is_taken_for_late_no_more():
    state = taught("a", "b")
    other = Call(replica("a"), state=state)
    other.begin()
    other.tokens(0, 1)
    state.ledger.failed(ReplicaId("a"), 2.0, 0.0, late=True)
    other.now = 0.1
    other.tokens(0, 2)
    assert state.ledger.breaker(ReplicaId("a"), 0.1) == "closed"


def test_a_stream_that_left_a_slow_replica_for_a_frozen_one_comes_back():
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    first = call.started()[0]
    call.tokens(0, 1)
    call.until(Stop)
    assert call.started()[0] != first
    gone = call.now
    call.effects = []
    call.until(Stop)
    assert call.started() == (first, ((1,),))
    assert call.now - gone < 6.0


def test_a_first_token_that_is_late_is_asked_of_another_one():
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    call.until(Stop)
    assert 2.0 <= call.now < 3.0
    assert call.started()[1] is None


def test_a_late_one_is_kept_where_there_is_no_other():
    call = Call(replica("a"), replica("b", file="another"), state=taught("a"))
    call.fleet = call.fleet[:1]
    call.begin()
    call.tokens(0, 1)
    for _ in range(5):
        assert plain(call.until_wake()) == []
    call.fleet.append(replica("c"))
    call.until(Stop)
    assert call.started() == ("c", ((1,),))


def test_a_late_one_is_kept_where_the_other_one_failed_a_moment_ago_or_the_budget_is_spent():
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    other = "b" if call.started()[0] == "a" else "a"
    call.state.ledger.failed(ReplicaId(other), 30.0, 0.0)
    for _ in range(5):
        assert plain(call.until_wake()) == []
    assert call.state.ledger.in_flight(ReplicaId(other)) == 0
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    while call.state.retries.may_retry():
        pass
    for _ in range(5):
        assert plain(call.until_wake()) == []


def test_while_the_caller_reads_nobody_is_late():
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    call.tokens(0, 1)
    call.machine.caller_reads()
    for _ in range(8):
        before = call.now
        assert plain(call.until_wake()) == []
        assert call.now > before
    call.machine.caller_waits(call.now)
    waited_from = call.now
    call.until(Stop)
    assert call.now - waited_from >= 1.0


def test_tokens_that_are_on_time_cost_no_effects():
    call = Call(replica("a"), state=taught("a"))
    call.begin()
    call.tokens(0, 1)
    for number in range(100):
        call.now += 0.02
        assert call.tokens(0, number) == []
        if call.now >= call.wake:
            assert plain(call.until_wake()) == []


# --- what is learned ----------------------------------------------------------------------------------------------------


def test_what_a_worker_showed_says_nothing_of_the_one_that_takes_its_place():
    call = Call(replica("a"), replica("b"), state=taught("a", "b"))
    call.begin()
    first, _ = call.started()
    assert call.state.deadlines.gap(first, 4.0) < GAP_UNKNOWN_SECONDS
    call.failed(0, CRASHED)
    assert call.state.deadlines.gap(first, 4.0) == GAP_UNKNOWN_SECONDS


@pytest.mark.parametrize(("local", "seconds"), [(True, 0.1), (False, 0.1 - HOP_SECONDS)])
def test_the_way_to_a_peer_is_no_part_of_its_speed(local, seconds):
    there = replace(replica("a"), local=local)
    call = Call(there, streams=False)
    call.begin()
    call.finished(0)
    assert call.state.ledger.annotated(there, 0.0).measured == pytest.approx(4.0 / seconds)


# --- hedges -------------------------------------------------------------------------------------------------------------


def measured(seconds=0.1, samples=100):
    state = RoutingState()
    for _ in range(samples):
        state.deadlines.saw_answer("m", 4.0, seconds, 0.0)
        state.hedges.answered(4.0)
    return state


def test_a_slow_answer_is_asked_of_a_second_replica_and_the_first_one_wins():
    for winner in (0, 1):
        call = Call(replica("a"), replica("b"), streams=False, state=measured())
        call.begin()
        call.effects = []
        start = call.until(Start)
        assert call.now == 0.1
        assert start.attempt == 1
        assert call.state.hedges.extra_units == 4.0
        assert call.machine.attempts[1].hedge
        assert call.finished(winner) == [Stop(1 - winner), Answer(winner)]
        assert {each.outcome for each in call.machine.attempts} == {"answered", "hedge_lost"}
        assert not call.state.ledger.in_flight(ReplicaId("a")) + call.state.ledger.in_flight(ReplicaId("b"))


def test_a_late_one_beside_one_that_is_not_late_yet_does_not_wake_its_call_again_and_again():
    call = Call(replica("a"), replica("b"), streams=False, state=measured())
    call.begin()
    call.effects = []
    call.until(Start)
    wakes = []
    while call.wake < 30.0:
        wakes.append(call.wake)
        call.until_wake()
        assert len(wakes) < 100, wakes[-5:]
    assert all(later > earlier for earlier, later in itertools.pairwise(wakes))
    assert call.finished(0) == [Stop(1), Answer(0)]


def test_a_hedge_that_fails_leaves_the_other_one_running():
    call = Call(replica("a"), replica("b"), streams=False, state=measured())
    call.begin()
    call.effects = []
    call.until(Start)
    assert plain(call.failed(0, CRASHED)) == []
    assert call.finished(1) == [Answer(1)]


def test_streams_forwarded_calls_and_unmeasured_ones_are_not_hedged():
    for shape in (
        {"streams": True},
        {"streams": False, "forwarded": True},
        {"streams": False, "state": RoutingState()},
    ):
        call = Call(replica("a"), replica("b"), **{"state": measured(), **shape})
        call.begin()
        assert call.wake > 1.0


def test_without_hedge_budget_there_is_none():
    call = Call(replica("a"), replica("b"), streams=False, state=measured())
    while call.state.hedges.may_hedge(1.0):
        call.state.hedges.take(1.0)
    call.begin()
    assert plain(call.until_wake()) == []
    assert not call.state.ledger.in_flight(ReplicaId("a")) * call.state.ledger.in_flight(ReplicaId("b"))


@pytest.mark.parametrize(("streams", "earned"), [(False, 4.0 * EXTRA_PART), (True, 0.0)])
def test_whole_answers_earn_hedges_and_streams_do_not(streams, earned):
    call = Call(replica("a"), streams=streams)
    call.begin()
    call.finished(0)
    assert call.state.hedges.saved == pytest.approx(earned)


def test_a_hedge_that_the_retry_budget_refuses_takes_nothing_from_the_hedge_budget():
    call = Call(replica("a"), replica("b"), streams=False, state=measured())
    while call.state.retries.may_retry():
        pass
    saved = call.state.hedges.saved
    assert call.state.hedges.may_hedge(4.0)
    call.begin()
    assert plain(call.until_wake()) == []
    assert call.now == 0.1, "that was the time of the hedge"
    assert (call.state.hedges.saved, call.state.hedges.extra_units) == (saved, 0.0)


# --- any fleet, any faults ----------------------------------------------------------------------------------------------

LENGTH = 12
"""Tokens of the answer in the world below; token n is n."""


class Faulty:
    """Replicas of a model of which each does, attempt by attempt, what its script says; then it works."""

    KINDS = ("stale_route", "overloaded", "peer_unreachable", "draining", "still_loading", "worker_crashed")

    def __init__(self, scripts, files, exact, streams, deadline, forwarded, cancel_at, shown=True):
        self.scripts, self.files, self.cancel_at = [list(each) for each in scripts], files, cancel_at
        self.state = RoutingState()
        if not streams:
            for _ in range(50):
                self.state.deadlines.saw_answer("m", 4.0, 0.05, 0.0)
                self.state.hedges.answered(4.0)
        self.down = {}
        self.time, self.heap, self.asked = 0.0, [], 0
        self.shape = CallShape(
            "key", "m", deadline, streams, demand=Demand(units=4.0), exact=exact, forwarded=forwarded, shown=shown
        )
        self.machine = CallMachine(self.shape, self.state, self.candidates, random.Random(3))
        self.running, self.got, self.ends, self.wake, self.most_running = {}, [], [], inf, 0
        self.kills_here = 0

    def candidates(self):
        return [
            replica(
                str(number),
                ReplicaState.RESTARTING if self.down.get(number, 0.0) > self.time else ReplicaState.READY,
                file=file,
                exact=number % 2 == 0,
                standing=MemberState.SUSPECT if number == 3 else MemberState.ALIVE,
            )
            for number, file in enumerate(self.files)
        ]

    def at(self, when, what, *args):
        self.asked += 1
        heappush(self.heap, (when, self.asked, what, args))

    def perform(self, effects):
        for effect in effects:
            assert not self.ends, "something was wanted after the end"
            match effect:
                case Start(attempt, reservation, resume):
                    self.start(attempt, int(reservation.replica), resume)
                case Stop(attempt):
                    del self.running[attempt]
                case Wake(at):
                    assert at >= self.time
                    self.wake = at
                    self.at(at, self.tick, at)
                case Answer() | Fail():
                    self.ends.append(effect)
        if not self.ends and not self.machine.over:
            assert self.wake <= self.shape.deadline, "nothing would end it"

    def start(self, attempt, number, resume):
        assert number not in [each for each, _ in self.running.values()]
        if resume is None and self.got:
            assert not self.shape.shown, "what the caller has was forgotten"
            self.got = []
        if self.got:
            assert resume == (tuple(self.got),), "tokens were lost or doubled"
            first = self.files[self.source]
            assert self.files[number] == first
            assert not (self.shape.exact and self.source % 2 == 0) or number % 2 == 0
        fault = self.scripts[number].pop(0) if self.scripts[number] else None
        self.running[attempt] = number, fault
        self.most_running = max(self.most_running, len(self.running))
        if not self.shape.streams:
            self.at(self.time + (0.3 if fault == "slow" else 0.02), self.whole, attempt)
        else:
            self.at(self.time + 0.05, self.step, attempt, len(self.got))

    def whole(self, attempt):
        if attempt not in self.running:
            return
        _, fault = self.running[attempt]
        if fault == "silent":
            return
        if fault in self.KINDS:
            self.fail(attempt, fault)
        else:
            self.finish(attempt)

    def step(self, attempt, position):
        if attempt not in self.running:
            return
        number, fault = self.running[attempt]
        kind, after = fault if isinstance(fault, tuple) else (fault, 0)
        if kind == "silent" and position >= after:
            return
        if kind in self.KINDS and position >= after:
            self.fail(attempt, kind)
        elif position >= LENGTH:
            self.finish(attempt)
        else:
            if not self.got:
                self.source = number
            self.got.append(position)
            self.kills_here = 0
            self.perform(self.machine.tokens(attempt, 0, [position], self.time))
            self.at(self.time + 0.03, self.step, attempt, position + 1)

    def fail(self, attempt, kind):
        number, _ = self.running.pop(attempt)
        sent = kind in ("worker_crashed", "peer_unreachable")
        if kind in ("worker_crashed", "draining"):
            self.down[number] = self.time + 0.7
        self.kills_here += sent
        assert self.kills_here <= 2 or not self.shape.streams
        retry_after = 0.2 if kind == "overloaded" else None
        self.perform(self.machine.failed(attempt, Failure(kind, sent=sent, retry_after=retry_after), self.time))

    def finish(self, attempt):
        del self.running[attempt]
        self.perform(self.machine.finished(attempt, Observation(4.0, 0.1), self.time))

    def tick(self, at):
        if at == self.wake:
            self.wake = inf
            self.perform(self.machine.tick(self.time))

    def cancel(self):
        self.perform(self.machine.cancelled(self.time))

    def run(self):
        self.perform(self.machine.begin(0.0))
        if self.cancel_at is not None:
            self.at(self.cancel_at, self.cancel)
        while self.heap and not self.machine.over:
            self.time, _, what, args = heappop(self.heap)
            what(*args)


fault = st.sampled_from([*Faulty.KINDS, "silent", "slow"]) | st.tuples(
    st.sampled_from([*Faulty.KINDS, "silent"]), st.integers(0, LENGTH)
)


@given(
    scripts=st.lists(st.lists(fault, max_size=5), max_size=4),
    one_file=st.booleans(),
    exact=st.booleans(),
    streams=st.booleans(),
    forwarded=st.booleans(),
    shown=st.booleans(),
    deadline=st.sampled_from([0.5, 5.0, 100.0]),
    cancel_at=st.none() | st.floats(0.01, 2.0),
)
@settings(max_examples=80, deadline=None)
def test_whatever_fails_every_call_ends_once_in_time_and_no_token_is_lost_or_doubled(
    scripts, one_file, exact, streams, forwarded, shown, deadline, cancel_at
):
    files = ["f" if one_file else f"f{number % 2}" for number in range(len(scripts))]
    world = Faulty(scripts, files, exact, streams, deadline, forwarded, cancel_at, shown)
    world.run()
    cancelled = cancel_at is not None and not world.ends
    assert world.machine.over
    assert len(world.ends) == (0 if cancelled else 1)
    assert world.time <= deadline
    assert not world.running
    assert all(world.state.ledger.in_flight(ReplicaId(str(number))) == 0 for number in range(len(scripts)))
    assert all(each.ended is not None for each in world.machine.attempts)
    assert world.most_running <= (1 if streams else 2)
    if world.ends and isinstance(world.ends[0], Answer) and streams:
        assert world.got == list(range(LENGTH))
    if forwarded:
        assert len({each.replica for each in world.machine.attempts}) == len(world.machine.attempts)


@given(
    scripts=st.lists(
        st.lists(st.sampled_from(["stale_route", "draining", "still_loading"]), max_size=4), min_size=1, max_size=4
    )
)
@settings(max_examples=40, deadline=None)
def test_whoever_has_a_live_replica_is_answered(scripts):
    world = Faulty(scripts, ["f"] * len(scripts), False, True, 100.0, False, None)
    world.run()
    assert isinstance(world.ends[0], Answer)
    assert world.time < 60.0
