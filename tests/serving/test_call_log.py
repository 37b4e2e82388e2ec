"""Counting calls."""

import asyncio

from tars.errors import Cancelled, Overloaded
from tars.serving.call_log import KEEP_ERRORS, CallLog


def test_counts_started_active_and_failed_calls():
    log = CallLog(lambda: 5.0)
    log.started("inference.chat")
    log.started("inference.chat")
    log.started("inference.embed")
    log.ended("inference.chat", None, "t")
    log.ended("inference.embed", Overloaded("busy"), "t2")
    counters = log.counters()
    assert (counters.total, counters.active, counters.failed, counters.by_method) == (
        3,
        1,
        1,
        {"inference.chat": 2, "inference.embed": 1},
    )
    (error,) = log.recent_errors()
    assert (error.at, error.method, error.error_kind, error.trace_id) == (
        5.0,
        "inference.embed",
        "overloaded",
        "t2",
    )


async def test_whoever_asks_a_node_at_rest_does_not_count_its_own_question_as_running():
    log = CallLog(lambda: 0.0)
    log.started("node.drain")
    assert (log.active, log.counters().active, log.counters().total) == (0, 0, 1)
    # It is still waited for: an answer that is on its way is not cut off.
    waiting = asyncio.ensure_future(log.idle())
    await asyncio.sleep(0)
    assert not waiting.done()
    log.ended("node.drain", None, "t")
    await asyncio.wait_for(waiting, 5)


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
