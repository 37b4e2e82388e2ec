"""Tables of what a worker's lifecycle does: event and time in, state and effects out. No process, no sleep."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars.core.types import ReplicaState
from tars.errors import BadModelFile, DiskFull, DoesNotFit, ReplicaFailed, WorkerCrashed
from tars.messages.node import LoadedInfo
from tars.workers.lifecycle import (
    BUSY_SECONDS,
    Effect,
    FailCalls,
    Happening,
    Kill,
    Lifecycle,
    Limits,
    Loaded,
    LoadFailed,
    PingAnswered,
    ProcessEnded,
    Progressed,
    SendPing,
    SendShutdown,
    Spawn,
    StartAsked,
    StopAsked,
    Tick,
    backoff,
)

LIMITS = Limits(
    start_timeout=100,
    ping_interval=2,
    hang=20,
    backoff_initial=1,
    backoff_most=30,
    stop=5,
    stable=60,
    crash_limit=4,
    cool_down=300,
)
INFO = LoadedInfo(model_kind="chat", memory_bytes=1, load_seconds=1.0)
S = ReplicaState


def ready(now: float = 0.0) -> Lifecycle:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), now)
    machine.handle(Loaded(INFO), now)
    assert machine.state is S.READY
    return machine


def tick_until(machine: Lifecycle, start: float, end: float, answer: PingAnswered | None) -> tuple[float, list[Effect]]:
    """Tick each second; answer each ping (or none). The moment and the effects of the first kill, or `end` and nothing."""
    now = start
    while now <= end:
        effects = machine.handle(Tick(), now)
        if any(isinstance(effect, Kill) for effect in effects):
            return now, effects
        if SendPing() in effects and answer is not None:
            machine.handle(answer, now)
        now += 1
    return end, []


@pytest.mark.parametrize(
    ("crashes", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 30), (7, 30), (10**6, 30)]
)
def test_backoff_doubles_up_to_its_most(crashes: int, seconds: float) -> None:
    assert backoff(LIMITS, crashes) == seconds


def test_a_good_start_goes_through_loading_to_ready() -> None:
    machine = Lifecycle(LIMITS)
    assert machine.handle(StartAsked(), 0) == [Spawn()]
    assert (machine.state, machine.progress.stage if machine.progress else None) == (S.STARTING, "spawn")
    assert machine.handle(Progressed("load", 140.0), 1) == []
    assert machine.state is S.LOADING
    assert machine.progress is not None
    assert machine.progress.percent == 100.0
    assert machine.handle(Loaded(INFO), 2) == []
    assert (machine.state, machine.info, machine.progress) == (S.READY, INFO, None)
    assert machine.handle(StartAsked(), 3) == []


def test_a_crash_fails_the_calls_and_restarts_after_the_backoff() -> None:
    machine = ready()
    [effect] = machine.handle(ProcessEnded("signal SIGSEGV"), 10)
    assert isinstance(effect, FailCalls)
    assert isinstance(effect.error, WorkerCrashed)
    assert effect.error.retry_after_ms == 1000
    assert machine.state is S.RESTARTING
    assert machine.next_wake() == 11
    assert machine.handle(Tick(), 10.9) == []
    assert machine.handle(Tick(), 11) == [Spawn()]
    assert (machine.state, machine.restarts, machine.info) == (S.STARTING, 1, None)


def test_quick_crashes_wait_longer_each_and_are_given_up_then_tried_once_in_a_while() -> None:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    now, waits = 0.0, []
    for _ in range(3):
        machine.handle(ProcessEnded("exit code 1"), now)
        assert machine.state is S.RESTARTING
        assert machine.restart_at is not None
        waits.append(machine.restart_at - now)
        now = machine.restart_at
        assert machine.handle(Tick(), now) == [Spawn()]
    assert waits == [1, 2, 4]
    [effect] = machine.handle(ProcessEnded("exit code 1"), now)
    assert machine.state is S.FAILED
    assert isinstance(effect, FailCalls)
    assert isinstance(machine.last_error, ReplicaFailed)
    assert "4 times in a row" in machine.last_error.message
    assert machine.next_wake() == now + 300
    assert machine.handle(Tick(), now + 299) == []
    assert machine.handle(StartAsked(), now + 299) == []
    assert not machine.retry_due
    # Another load may be under way on its device: it waits to be asked.
    assert machine.handle(Tick(), now + 300) == []
    assert (machine.state, machine.retry_due, machine.next_wake()) == (S.FAILED, True, None)
    assert machine.handle(StartAsked(), now + 350) == [Spawn()]
    assert (machine.state, machine.retry_due, machine.restarts) == (S.STARTING, False, 4)
    machine.handle(ProcessEnded("exit code 1"), now + 351)
    assert (machine.state, machine.retry_due) == (S.FAILED, False)
    machine.handle(Tick(), now + 651)
    assert machine.retry_due
    machine.handle(StopAsked(), now + 652)
    assert (machine.state, machine.retry_due) == (S.STOPPED, False)


def test_a_restart_waits_while_something_else_loads_on_its_device() -> None:
    machine = ready()
    machine.handle(ProcessEnded("signal SIGKILL"), 10)
    assert machine.next_wake() == 11
    for now in (11, 11.25, 11.5):
        assert machine.handle(Tick(device_busy=True), now) == []
        assert (machine.state, machine.restarts, machine.next_wake()) == (S.RESTARTING, 0, now + BUSY_SECONDS)
    assert machine.handle(Tick(), 11.75) == [Spawn()]
    # What runs is watched however busy its device is.
    assert machine.handle(Tick(device_busy=True), 13.75) == [SendPing()]


def test_a_stable_time_forgives_earlier_crashes() -> None:
    machine = ready()
    for crash in range(10):
        now = 1000.0 * crash
        machine.handle(ProcessEnded("signal SIGKILL"), now + 61)
        assert machine.state is S.RESTARTING
        assert machine.restart_at == now + 62
        machine.handle(Tick(), now + 62)
        machine.handle(Loaded(INFO), now + 1000)


@pytest.mark.parametrize("error", [BadModelFile("x"), ReplicaFailed("x")])
def test_a_load_that_cannot_heal_is_failed_at_once_and_stays_so(error: BadModelFile) -> None:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    assert [type(effect) for effect in machine.handle(LoadFailed(error), 1)] == [SendShutdown, Kill]
    assert machine.handle(ProcessEnded("exit code 0"), 2) == []
    assert (machine.state, machine.last_error, machine.next_wake()) == (S.FAILED, error, None)
    assert machine.handle(Tick(), 10_000) == []


def test_a_load_that_ran_out_of_memory_is_failed_at_once_and_tried_again_when_somebody_may_have_given_some_back() -> (
    None
):
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    for began in (0, 400):
        error = DoesNotFit("x")
        assert [type(effect) for effect in machine.handle(LoadFailed(error), began + 1)] == [SendShutdown, Kill]
        assert machine.handle(ProcessEnded("exit code 0"), began + 2) == []
        assert (machine.state, machine.last_error, machine.next_wake()) == (S.FAILED, error, began + 301)
        assert machine.handle(StartAsked(), began + 300) == []
        assert machine.handle(Tick(), began + 301) == []
        assert machine.retry_due
        assert machine.handle(StartAsked(), began + 400) == [Spawn()]
    machine.handle(Loaded(INFO), 900)
    assert machine.state is S.READY


def test_a_load_that_may_heal_is_tried_again_and_keeps_its_reason() -> None:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    error = DiskFull("no room")
    assert [type(effect) for effect in machine.handle(LoadFailed(error), 1)] == [Kill]
    machine.handle(ProcessEnded("signal SIGKILL"), 1)
    assert (machine.state, machine.last_error) == (S.RESTARTING, error)


def test_no_answer_to_a_ping_is_a_hang_after_its_time() -> None:
    machine = ready()
    when, effects = tick_until(machine, 0, 60, None)
    assert effects == [Kill("no answer for 20 s")]
    assert 20 <= when <= 24
    assert machine.next_wake() is None
    [effect] = machine.handle(ProcessEnded("signal SIGKILL: often the system ran out of memory"), when)
    assert isinstance(effect, FailCalls)
    assert machine.last_error is not None
    assert "no answer for 20 s" in machine.last_error.message


def test_an_unanswered_ping_is_looked_at_once_in_an_interval_and_not_without_a_pause() -> None:
    machine = ready()
    looks = []
    while (wake := machine.next_wake()) is not None and len(looks) < 100:
        looks.append(wake)
        machine.handle(Tick(), wake)
    assert looks == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]


def test_calls_without_progress_are_a_hang_and_calls_with_progress_or_none_at_all_are_not() -> None:
    machine = ready()
    when, effects = tick_until(machine, 0, 60, PingAnswered(mark=7, in_flight=2))
    assert effects == [Kill("calls without progress for 20 s")]
    assert 20 <= when <= 24
    assert tick_until(ready(), 0, 200, PingAnswered(mark=7, in_flight=0)) == (200, [])
    machine = ready()
    for second in range(200):
        if SendPing() in machine.handle(Tick(), second):
            machine.handle(PingAnswered(mark=second, in_flight=1), second)
    assert machine.state is S.READY


def test_a_node_that_slept_itself_does_not_blame_the_worker() -> None:
    machine = ready()
    assert tick_until(machine, 0, 10, None) == (10, [])
    assert not any(isinstance(effect, Kill) for effect in machine.handle(Tick(), 5000))
    when, effects = tick_until(machine, 5001, 5100, None)
    assert effects
    assert when >= 5020


def test_a_load_has_patience_while_native_code_holds_the_interpreter() -> None:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    machine.handle(Progressed("import", 1), 0)
    when, effects = tick_until(machine, 0, 200, None)
    assert effects == [Kill("no progress of the load for 100 s")]
    assert when == 100


def test_a_load_that_progresses_is_never_killed_however_long_it_takes() -> None:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    for now in range(1000):
        machine.handle(Progressed("load", now / 10), now)
        effects = machine.handle(Tick(), now)
        assert not any(isinstance(effect, Kill) for effect in effects)
        if SendPing() in effects:
            machine.handle(PingAnswered(0, 0), now)


def test_a_process_that_stops_while_it_loads_weights_is_a_hang() -> None:
    machine = Lifecycle(LIMITS)
    machine.handle(StartAsked(), 0)
    machine.handle(Progressed("load", 50), 0)
    assert tick_until(machine, 0, 200, None)[1] == [Kill("no answer for 20 s")]


def test_stop_asks_then_kills_and_ends_stopped() -> None:
    machine = ready()
    assert machine.handle(StopAsked(), 100) == [SendShutdown()]
    assert machine.handle(StopAsked(), 101) == []
    assert machine.next_wake() == 105
    assert machine.handle(Tick(), 104) == []
    assert [type(effect) for effect in machine.handle(Tick(), 105)] == [Kill]
    assert machine.next_wake() is None
    assert machine.handle(ProcessEnded("signal SIGKILL"), 106) == []
    assert machine.state is S.STOPPED


def test_stop_during_a_backoff_needs_no_process() -> None:
    machine = ready()
    machine.handle(ProcessEnded("exit code 1"), 1)
    assert machine.handle(StopAsked(), 1.5) == []
    assert (machine.state, machine.next_wake()) == (S.STOPPED, None)
    assert machine.handle(Tick(), 100) == []


def test_late_words_of_a_dead_worker_change_nothing() -> None:
    machine = ready()
    machine.handle(ProcessEnded("exit code 1"), 1)
    for event in (
        Progressed("load", 5),
        Loaded(INFO),
        LoadFailed(BadModelFile("x")),
        PingAnswered(1, 1),
        ProcessEnded("again"),
    ):
        assert machine.handle(event, 1.1) == []
    assert machine.state is S.RESTARTING


EVENTS = st.one_of(
    st.just(StartAsked()),
    st.just(StopAsked()),
    st.just(Tick()),
    st.builds(Progressed, st.sampled_from(["import", "load"]), st.floats(0, 100)),
    st.just(Loaded(INFO)),
    st.sampled_from([LoadFailed(BadModelFile("x")), LoadFailed(DiskFull("x"))]),
    st.builds(PingAnswered, st.integers(0, 3), st.integers(0, 2)),
    st.just(ProcessEnded("exit code 1")),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 400)), max_size=60), st.integers(1, 4))
def test_no_order_of_events_makes_an_illegal_transition_or_two_processes(
    events: list[tuple[Happening, float]], crash_limit: int
) -> None:
    machine = Lifecycle(replace(LIMITS, crash_limit=crash_limit))
    now, alive = 0.0, False
    for event, delay in events:
        now += delay
        if isinstance(event, ProcessEnded):
            if not alive:
                continue
            alive = False
        for effect in machine.handle(event, now):
            if isinstance(effect, Spawn):
                assert not alive
                alive = True
        if event == Tick() and (wake := machine.next_wake()) is not None:
            assert wake > now  # else the driver would tick without a pause
        assert machine.state is not S.STOPPED or not alive
        assert machine.state not in (S.STARTING, S.LOADING, S.READY, S.STOPPING) or alive
