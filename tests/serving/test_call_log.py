"""Counting calls."""

from tars.errors import Cancelled, Overloaded
from tars.serving.call_log import KEEP_ERRORS, CallLog


def test_counts_started_active_and_failed_calls():
    log = CallLog(lambda: 5.0)
    log.started("a")
    log.started("a")
    log.started("b")
    log.ended("a", None, "t")
    log.ended("b", Overloaded("busy"), "t2")
    counters = log.counters()
    assert (counters.total, counters.active, counters.failed, counters.by_method) == (3, 1, 1, {"a": 2, "b": 1})
    (error,) = log.recent_errors()
    assert (error.at, error.method, error.error_kind, error.trace_id) == (5.0, "b", "overloaded", "t2")


def test_keeps_only_the_newest_errors_newest_first():
    log = CallLog(lambda: 0.0)
    for number in range(KEEP_ERRORS + 5):
        log.started("m")
        log.ended("m", Overloaded(str(number)), "t")
    assert [error.message for error in log.recent_errors()][:2] == [str(KEEP_ERRORS + 4), str(KEEP_ERRORS + 3)]
    assert len(log.recent_errors()) == KEEP_ERRORS


def test_a_caller_who_stops_is_no_failure():
    log = CallLog(lambda: 0.0)
    log.started("m")
    log.ended("m", Cancelled("gone"), "t")
    assert (log.counters().failed, log.recent_errors(), log.active) == (0, [], 0)
