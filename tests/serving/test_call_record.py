"""What is kept of the last calls."""

import pytest
from hand_clock import Clock

from tars.core.types import Deadline
from tars.errors import Overloaded
from tars.messages.base import CallContext
from tars.serving.call_record import CallRecords


def call(trace="t", **more):
    return CallContext(Deadline(1e9), trace, method="inference.chat", caller="alice", **more)


@pytest.fixture
def clock():
    return Clock(10.0)


@pytest.fixture
def records(clock):
    return CallRecords(clock, lambda: 1_700_000_000.0, keep=3)


def test_a_call_can_be_looked_up_while_it_runs(records, clock):
    record = records.open(call(), "m")
    assert records.find("t") == (record,)
    assert (record.method, record.model, record.caller, record.at) == ("inference.chat", "m", "alice", 1_700_000_000.0)
    assert (record.started, record.ended, record.outcome) == (10.0, None, "running")
    clock.now = 12.0
    record.answered()
    assert (record.ended, record.outcome) == (12.0, "answered")


def test_how_it_ended_first_is_how_it_ended(records):
    record = records.open(call(), "m")
    record.failed(Overloaded("busy"))
    record.left()
    record.answered()
    assert (record.outcome, record.error) == ("overloaded", "busy")


def test_a_caller_who_goes_away_is_no_error(records):
    record = records.open(call(), "m")
    record.left()
    assert (record.outcome, record.error) == ("cancelled", "")


def test_waits_are_measured_whatever_ends_them(records, clock):
    record = records.open(call(), "m")

    def cancelled():
        with record.waiting("load"):
            assert record.waits[0].ended is None
            clock.now = 11.5
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cancelled()
    assert [(wait.what, wait.started, wait.ended) for wait in record.waits] == [("load", 10.0, 11.5)]


def test_only_the_last_calls_are_kept(records):
    for number in range(5):
        records.open(call(f"t{number}"), "m").answered()
    assert len(records) == 3
    assert not records.find("t1")
    assert [len(records.find(f"t{number}")) for number in (2, 3, 4)] == [1, 1, 1]


def test_calls_of_one_trace_are_told_apart(records):
    first, second = records.open(call(), "m"), records.open(call(), "n")
    assert records.find("t") == (first, second)
    for _ in range(2):
        records.open(call("other"), "m")
    assert records.find("t") == (second,)


def test_the_parts_of_a_node_that_one_call_passes_through_share_its_record(records):
    first = call()
    record = records.open(first, "m")
    assert records.open(first, "m") is record
    # Equal, and yet another call.
    assert records.open(call(), "m") is not record
    record.answered()
    assert len(records) == 2


def test_a_repeated_call_names_the_one_whose_answer_it_got(records):
    record = records.open(call(), "m")
    record.answered("repeated", of="earlier")
    assert (record.outcome, record.repeats) == ("repeated", "earlier")


def test_a_peers_call_names_the_gateway(records):
    assert records.open(call(hops=1, peer="node-b"), "m").forwarded_by == "node-b"
    # A node that asks for itself is the caller.
    assert records.open(call(peer="node-b"), "m").forwarded_by is None
