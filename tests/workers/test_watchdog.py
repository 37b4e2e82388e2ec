from __future__ import annotations

from tars.workers.watchdog import StepWatchdog


def test_a_mark_that_stands_still_with_work_in_flight_is_stuck_once_in_each_patience() -> None:
    watchdog = StepWatchdog(20)
    stuck = [now for now in range(100) if watchdog.is_stuck(mark=7, busy=True, now=now)]
    assert stuck == [20, 40, 60, 80]


def test_progress_and_idleness_begin_the_patience_anew() -> None:
    watchdog = StepWatchdog(20)
    assert not any(watchdog.is_stuck(mark=now // 19, busy=True, now=now) for now in range(200))
    assert not any(watchdog.is_stuck(mark=7, busy=False, now=now) for now in range(200, 400))
    assert not watchdog.is_stuck(mark=7, busy=True, now=410)
    assert watchdog.is_stuck(mark=7, busy=True, now=419)


def test_it_looks_often_enough_to_be_on_time() -> None:
    assert StepWatchdog(20).interval == 1.0
    assert StepWatchdog(0.5).interval == 0.05
