"""The supervisor over real child processes with a fake engine: crash, kill, hang, stop, noise, restart, orphan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tars.core.types import Deadline, ReplicaState
from tars.errors import (
    BadGrammar,
    BadModelFile,
    CallerError,
    DeadlineExceeded,
    Draining,
    InvalidParams,
    Overloaded,
    ReplicaFailed,
    StillLoading,
    TarsError,
    WorkerCrashed,
)
from tars.messages.inference import CompleteParams, Delta, Embedded, EmbedParams, Generated, Tokenized, TokenizeParams
from tars.workers.calls import CallHandle
from tars.workers.engine import Event, LoadSpec, Resume, Work
from tars.workers.options import WorkerOptions
from tars.workers.supervisor import ReplicaWorker

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent

FAST = {
    "start_timeout_seconds": 10.0,
    "ping_interval_seconds": 0.05,
    "hang_seconds": 0.6,
    "backoff_initial_seconds": 0.02,
    "backoff_most_seconds": 0.1,
    "stop_seconds": 2.0,
    "crash_limit": 3,
}
"""Times short enough for tests, still several times what a busy two-core machine needs for a ping."""


def spec(path: str = "ok", slots: int = 1) -> LoadSpec:
    return LoadSpec(replica="fake@cpu#0", model="fake", engine="fake", path=path, slots=slots)


def options(**changes: object) -> WorkerOptions:
    environment = {"PYTHONPATH": str(HERE)}
    return WorkerOptions(engines={"fake": "fake_engine:FakeEngine"}, environment=environment, **{**FAST, **changes})  # type: ignore[arg-type]  # a test's shorthand


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline(time.monotonic() + seconds)


Make = Callable[..., Awaitable[ReplicaWorker]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Starts workers; afterwards all of them must stop, leaving no process."""
    workers: list[ReplicaWorker] = []
    pids: set[int] = set()

    async def start(path: str = "ok", *, slots: int = 1, ready: bool = True, **changes: object) -> ReplicaWorker:
        def note(worker: ReplicaWorker) -> None:
            if worker.pid is not None:
                pids.add(worker.pid)

        worker = ReplicaWorker(spec(path, slots), options(**changes), note)
        workers.append(worker)
        await worker.start()
        if ready:
            await worker.wait_ready(20)
        return worker

    yield start
    for worker in workers:
        await worker.stop(0)
        assert worker.state is ReplicaState.STOPPED
        assert worker.pid is None
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[ReplicaWorker]:
    """One worker for all tests that do it no harm; afterwards it must never have been restarted."""
    worker = ReplicaWorker(spec(), options(hang_seconds=5.0), lambda worker: None)
    await worker.start()
    await worker.wait_ready(20)
    yield worker
    assert (worker.restarts, worker.active_calls, worker.queued_calls) == (0, 0, 0)
    await worker.stop(0)


together = pytest.mark.asyncio(loop_scope="module")


async def collect(worker: ReplicaWorker, work: Work, deadline: Deadline | None = None) -> list[Event]:
    return [event async for event in worker.run(work, deadline or soon())]


async def until_its_error(stream: AsyncIterator[Event]) -> tuple[list[int], TarsError | None]:
    """The rest of a stream's tokens and the error that ended it."""
    tokens: list[int] = []
    try:
        async for event in stream:
            assert isinstance(event, Delta)
            tokens += event.token_ids
    except TarsError as error:
        return tokens, error
    return tokens, None


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # the condition is another process's doing: nothing sets an event
            await asyncio.sleep(0.005)


@together
async def test_events_arrive_in_order_and_end_with_the_result(shared: ReplicaWorker) -> None:
    worker = shared
    before = worker.calls_total
    events = await collect(worker, CompleteParams(prompt="count 200"))
    assert [event.text for event in events if isinstance(event, Delta)] == [f"{n} " for n in range(200)]
    assert isinstance(events[-1], Generated)
    assert worker.calls_total == before + 1
    assert (worker.active_calls, worker.queued_calls) == (0, 0)


@together
async def test_a_call_of_several_answers_with_log_probabilities_comes_whole(shared: ReplicaWorker) -> None:
    events = await collect(shared, CompleteParams(prompt="count 20", n=3, logprobs=1))
    deltas = [event for event in events if isinstance(event, Delta)]
    for index in range(3):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == "".join(f"{n} " for n in range(20))
        assert [one.top[0][0] for delta in mine for one in delta.logprobs or ()] == [f"{n} " for n in range(20)]


@together
async def test_a_reader_who_falls_behind_gets_the_same_text_in_fewer_pieces(shared: ReplicaWorker) -> None:
    stream = shared.run(CompleteParams(prompt="count 5000"), soon())
    deltas = [await anext(stream)]
    # Another call's answer: the first one's engine is through, and nothing of it was read meanwhile.
    await collect(shared, CompleteParams(prompt="count 1"))
    deltas += [event async for event in stream]
    assert isinstance(deltas.pop(), Generated)
    assert [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids] == list(range(5000))
    assert len(deltas) < 1000


@together
async def test_every_kind_of_work_is_answered_with_its_result(shared: ReplicaWorker) -> None:
    worker = shared
    assert isinstance((await collect(worker, TokenizeParams(text="x")))[0], Tokenized)
    assert isinstance((await collect(worker, EmbedParams(input=["a", "bb"])))[0], Embedded)


@together
async def test_native_prints_go_to_the_log_and_never_into_the_stream(shared: ReplicaWorker) -> None:
    worker = shared
    for _ in range(3):
        assert isinstance((await collect(worker, CompleteParams(prompt="print")))[-1], Generated)
    assert worker.restarts == 0
    await until(lambda: "C printf 1" in worker.last_lines and "python print" in worker.last_lines)


@together
async def test_an_engines_error_reaches_the_caller_and_a_bug_reaches_it_without_its_text(shared: ReplicaWorker) -> None:
    worker = shared
    with pytest.raises(BadGrammar, match="no such grammar"):
        await collect(worker, CompleteParams(prompt="fail"))
    with pytest.raises(TarsError) as caught:
        await collect(worker, CompleteParams(prompt="bug"))
    assert caught.value.kind == "internal"
    assert "secret" not in str(caught.value)
    assert worker.state is ReplicaState.READY


async def test_a_call_while_loading_is_told_stage_percent_and_when_to_come_back(make: Make, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    worker = await make(f"slow:{gate}", ready=False)
    await until(
        lambda: worker.progress is not None and worker.progress.stage == "load" and worker.progress.percent > 20
    )
    with pytest.raises(StillLoading) as caught:
        await collect(worker, CompleteParams(prompt="count 1"))
    assert caught.value.details["stage"] == "load"
    assert caught.value.details["percent"] > 20
    assert caught.value.retry_after_ms is not None
    with pytest.raises(StillLoading):
        await worker.wait_ready(0.01)
    gate.touch()
    await worker.wait_ready(20)
    assert worker.progress is None
    assert worker.info is not None


async def test_a_crash_mid_call_is_a_retryable_error_and_the_worker_comes_back(make: Make) -> None:
    worker = await make()
    pid = worker.pid
    with pytest.raises(WorkerCrashed) as caught:
        await collect(worker, CompleteParams(prompt="abort"))
    assert caught.value.retryable
    assert caught.value.retry_after_ms
    assert "SIGABRT" in str(worker.last_error)
    await worker.wait_ready(20)
    assert worker.restarts == 1
    assert worker.pid != pid
    assert await collect(worker, CompleteParams(prompt="count 1"))


async def test_a_worker_comes_back_only_when_nothing_else_loads_on_its_device(make: Make) -> None:
    worker = await make()
    asked = 0

    def busy() -> bool:
        nonlocal asked
        asked += worker.state is ReplicaState.RESTARTING
        return asked < 3

    worker.device_busy = busy
    with pytest.raises(WorkerCrashed):
        await collect(worker, CompleteParams(prompt="abort"))
    await worker.wait_ready(20)
    assert asked == 3


async def test_what_a_dead_worker_printed_last_is_in_a_log_of_warnings(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    worker = await make()
    with pytest.raises(WorkerCrashed):
        await collect(worker, CompleteParams(prompt="abort"))
    assert "Fatal Python error: Aborted" in caplog.text


async def test_a_killed_worker_fails_all_its_calls_at_once(make: Make) -> None:
    worker = await make(slots=2)
    calls = [asyncio.create_task(collect(worker, CompleteParams(prompt="forever"))) for _ in range(3)]
    await until(lambda: (worker.active_calls, worker.queued_calls) == (2, 1))
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, WorkerCrashed)
    await worker.wait_ready(20)


@pytest.mark.slow
async def test_a_stopped_worker_counts_as_hung_and_is_replaced(make: Make) -> None:
    worker = await make()
    pid = worker.pid
    assert pid
    call = asyncio.create_task(collect(worker, CompleteParams(prompt="forever")))
    await until(lambda: worker.active_calls == 1)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerCrashed):
        await call
    await worker.wait_ready(20)
    assert worker.pid != pid
    assert "no answer" in str(worker.last_error)


@pytest.mark.slow
async def test_an_engine_that_hangs_behind_a_live_event_loop_is_replaced(make: Make) -> None:
    worker = await make()
    with pytest.raises(WorkerCrashed):
        await collect(worker, CompleteParams(prompt="hang"))
    assert "without progress" in str(worker.last_error)
    await worker.wait_ready(20)


def nicenesses(pid: int | None) -> list[int]:
    """Of each of its threads."""
    return [os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.parametrize(("said", "behind"), [({}, 5), ({"nice": 0}, 0)])
async def test_an_engine_stands_behind_the_node_for_the_processor_once_it_is_loaded(
    make: Make, tmp_path: Path, said: dict[str, int], behind: int
) -> None:
    go = tmp_path / "go"
    worker = await make(f"slow:{go}", ready=False, **said)
    await until(lambda: worker.progress is not None and worker.progress.stage == "load")
    mine = psutil.Process().nice()
    assert set(nicenesses(worker.pid)) == {mine}, "a load is not kept waiting"
    go.touch()
    await worker.wait_ready(20)
    assert set(nicenesses(worker.pid)) == {min(19, mine + behind)}
    assert len(nicenesses(worker.pid)) > 1, "its engine has a thread of its own"


async def test_a_step_that_stands_still_is_broken_off_and_tried_again_before_the_worker_counts_as_hung(
    make: Make,
) -> None:
    worker = await make(abort_seconds=0.2, hang_seconds=5.0)
    assert isinstance((await collect(worker, CompleteParams(prompt="stuck-once")))[-1], Generated)
    with pytest.raises(WorkerCrashed, match="broken off twice"):
        await collect(worker, CompleteParams(prompt="stuck"))
    assert worker.state is ReplicaState.READY
    assert worker.restarts == 0
    assert await collect(worker, CompleteParams(prompt="count 1"))


@pytest.mark.slow
async def test_a_step_is_broken_off_early_enough_for_a_second_try_whatever_the_options_say(make: Make) -> None:
    worker = await make(abort_seconds=100.0, hang_seconds=3.0)
    with pytest.raises(WorkerCrashed, match="broken off twice"):
        await collect(worker, CompleteParams(prompt="stuck"))
    assert worker.restarts == 0


@pytest.mark.slow
async def test_a_node_that_does_not_read_bounds_the_workers_memory_and_loses_only_those_calls(make: Make) -> None:
    worker = await make(hang_seconds=30.0)
    assert worker.pid
    stream = worker.run(CompleteParams(prompt="flood"), soon(60))
    await anext(stream)
    # 64 KiB a delta and as fast as they can be made, while this event loop, the only reader of the pipe, stands still until the worker
    # has given up: then it has nothing to do.
    process = psutil.Process(worker.pid)
    before, most = process.memory_info().rss, 0
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        most = max(most, process.memory_info().rss)
        used = process.cpu_times().user
        time.sleep(0.2)  # noqa: ASYNC251  # the event loop is meant to stand still
        if process.cpu_times().user - used < 0.01:
            break
    assert most - before < 160 * 2**20, f"{(most - before) / 2**20:.0f} MiB"
    with pytest.raises(Overloaded, match="too slowly"):
        [event async for event in stream]
    assert worker.restarts == 0
    assert await collect(worker, CompleteParams(prompt="count 1"))


@together
async def test_counters_come_with_the_pongs(shared: ReplicaWorker) -> None:
    def generated() -> int:
        return shared.counters.generated_tokens if shared.counters is not None else 0

    before = generated()
    await collect(shared, CompleteParams(prompt="count 123"))
    await until(lambda: generated() >= before + 123)


@pytest.mark.slow
async def test_counters_begin_anew_with_the_worker(make: Make) -> None:
    worker = await make()
    await collect(worker, CompleteParams(prompt="count 50"))
    await until(lambda: worker.counters is not None and worker.counters.generated_tokens == 50)
    with pytest.raises(WorkerCrashed):
        await collect(worker, CompleteParams(prompt="abort"))
    await worker.wait_ready(20)
    await until(lambda: worker.counters is not None)
    assert worker.counters is not None
    assert worker.counters.generated_tokens == 0


@pytest.mark.slow
async def test_a_running_answer_is_saved_and_goes_on_where_it_was_without_a_gap(make: Make, tmp_path: Path) -> None:
    worker = await make(saved_folder=tmp_path / "sequences")
    handle = CallHandle()
    stream = worker.run(CompleteParams(prompt="slow 300"), soon(), handle=handle)
    tokens: list[int] = []
    while len(tokens) < 40:
        event = await anext(stream)
        assert isinstance(event, Delta)
        tokens += event.token_ids
    state = await worker.save(handle, soon())
    rest_of_it, end = await until_its_error(stream)
    assert isinstance(end, Draining)
    tokens += rest_of_it
    assert state.path.parent == tmp_path / "sequences"
    assert state.path.stat().st_mode & 0o777 == 0o600
    assert state.path.parent.stat().st_mode & 0o777 == 0o700
    assert state.saved.bytes == state.path.stat().st_size
    assert tokens == state.saved.generated
    assert (worker.active_calls, worker.queued_calls) == (0, 0)

    # On another worker, which knows the answer by its state only; two tokens' text was held back.
    other = await make()
    resume = Resume(
        generated=[state.saved.generated], handed_out=[len(tokens) - 2], seed=state.saved.seed, path=str(state.path)
    )
    rest = [event async for event in other.run(CompleteParams(prompt="slow 300"), soon(), resume=resume)]
    assert isinstance(rest.pop(), Generated)
    assert tokens[:-2] + [token for delta in rest if isinstance(delta, Delta) for token in delta.token_ids] == list(
        range(300)
    )


async def test_what_cannot_be_saved_is_said_and_leaves_no_file(make: Make, tmp_path: Path) -> None:
    worker = await make(saved_folder=tmp_path)
    with pytest.raises(CallerError, match="not running here"):
        await worker.save(CallHandle(), soon())
    handle = CallHandle()
    events = worker.run(CompleteParams(prompt="count 3"), soon(), handle=handle)
    async for _ in events:
        pass
    with pytest.raises(CallerError, match="not running here"):
        await worker.save(handle, soon())
    handle = CallHandle()
    stream = worker.run(CompleteParams(prompt="forever"), soon(), handle=handle)
    await anext(stream)
    with pytest.raises(DeadlineExceeded):
        await worker.save(handle, Deadline(time.monotonic() - 1))
    assert os.listdir(tmp_path) == []
    assert isinstance(await anext(stream), Delta), "a refused save does the answer no harm"
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        await worker.save(handle, soon(0.1))
    assert os.listdir(tmp_path) == []
    os.kill(worker.pid, signal.SIGCONT)
    await stream.aclose()


async def test_a_full_queue_does_not_keep_a_running_answer_from_being_saved(make: Make, tmp_path: Path) -> None:
    worker = await make(queue_limit=1, saved_folder=tmp_path)
    handle = CallHandle()
    stream = worker.run(CompleteParams(prompt="forever"), soon(), handle=handle)
    await anext(stream)
    waiting = asyncio.create_task(collect(worker, CompleteParams(prompt="count 1")))
    await until(lambda: worker.queued_calls == 1)
    assert (await worker.save(handle, soon())).saved.generated
    assert await waiting
    await stream.aclose()


async def test_an_answer_is_saved_while_its_replica_is_being_stopped(make: Make, tmp_path: Path) -> None:
    worker = await make(saved_folder=tmp_path)
    handle = CallHandle()
    stream = worker.run(CompleteParams(prompt="forever"), soon(), handle=handle)
    await anext(stream)
    stopping = asyncio.create_task(worker.stop(grace=20))
    await until(lambda: worker.state is ReplicaState.STOPPING)
    with pytest.raises(Draining):
        await collect(worker, CompleteParams(prompt="count 1"))
    state = await worker.save(handle, soon())
    _, end = await until_its_error(stream)
    assert isinstance(end, Draining)
    assert state.saved.generated
    await stopping  # long before the grace time is over: nothing runs any more


@together
async def test_a_call_that_is_broken_off_ends_after_what_came_and_frees_the_engine(shared: ReplicaWorker) -> None:
    handle = CallHandle()
    stream = shared.run(CompleteParams(prompt="forever"), soon(), handle=handle)
    await anext(stream)
    shared.break_off(handle, Draining("goes elsewhere"))
    _, end = await until_its_error(stream)
    assert isinstance(end, Draining)
    assert end.message == "goes elsewhere"
    assert await collect(shared, CompleteParams(prompt="count 1")), "its slot is free"
    shared.break_off(handle, Draining("twice"))
    shared.break_off(CallHandle(), Draining("what never ran"))


async def test_a_call_of_several_answers_takes_as_many_slots(make: Make) -> None:
    worker = await make(slots=4, queue_limit=1)
    calls = [asyncio.create_task(collect(worker, CompleteParams(prompt="forever", n=2))) for _ in range(3)]
    await until(lambda: (worker.active_calls, worker.queued_calls) == (2, 1))
    with pytest.raises(Overloaded) as caught:
        await collect(worker, CompleteParams(prompt="count 1"))
    assert caught.value.details == {"limit": 1, "queued": 1}
    assert caught.value.retry_after_ms is not None
    assert 200 <= caught.value.retry_after_ms <= 60_000
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)


@pytest.mark.slow
async def test_a_long_busy_call_is_not_mistaken_for_a_hang(make: Make) -> None:
    worker = await make()
    with pytest.raises(DeadlineExceeded):
        await collect(worker, CompleteParams(prompt="forever"), soon(1.5))
    assert worker.restarts == 0


@together
async def test_closing_the_iterator_cancels_the_work_in_the_engine(shared: ReplicaWorker) -> None:
    worker = shared
    stream = worker.run(CompleteParams(prompt="forever"), soon())
    assert isinstance(await anext(stream), Delta)
    await stream.aclose()
    assert worker.active_calls == 0
    # The engine serves one call at a time: the next answer proves that the first was stopped.
    assert await collect(worker, CompleteParams(prompt="count 1"))


@together
async def test_the_deadline_ends_a_call_and_frees_the_engine(shared: ReplicaWorker) -> None:
    worker = shared
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await collect(worker, CompleteParams(prompt="forever"), soon(0.2))
    assert time.monotonic() - started < 2
    with pytest.raises(DeadlineExceeded):
        await collect(worker, CompleteParams(prompt="count 1"), Deadline(time.monotonic() - 1))
    assert await collect(worker, CompleteParams(prompt="count 1"))


async def test_calls_beyond_the_queue_bound_are_refused(make: Make) -> None:
    worker = await make(queue_limit=1)
    calls = [asyncio.create_task(collect(worker, CompleteParams(prompt="forever"))) for _ in range(2)]
    await until(lambda: worker.queued_calls == 1)
    with pytest.raises(Overloaded) as caught:
        await collect(worker, CompleteParams(prompt="count 1"))
    assert caught.value.retry_after_ms
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert await collect(worker, CompleteParams(prompt="count 1"))


@together
async def test_a_call_that_the_engine_has_ended_counts_no_longer_however_slowly_its_caller_reads(
    shared: ReplicaWorker,
) -> None:
    ends: list[object] = []
    stream = shared.run(CompleteParams(prompt="count 3"), soon(), on_end=ends.append)
    first = await anext(stream)
    await until(lambda: bool(ends))
    assert (shared.active_calls, shared.queued_calls) == (0, 0)
    (end,) = ends
    # What was not read yet is still there.
    rest = [event async for event in stream]
    assert isinstance(first, Delta)
    assert (rest[-1], len(rest)) == (end, 3)
    assert len(ends) == 1


@together
async def test_who_asks_hears_that_a_call_was_cancelled_or_failed(shared: ReplicaWorker) -> None:
    ends: list[object] = []
    stream = shared.run(CompleteParams(prompt="forever"), soon(), on_end=ends.append)
    await anext(stream)
    assert ends == []
    await stream.aclose()
    assert ends == [None]
    with pytest.raises(DeadlineExceeded):
        async for _ in shared.run(CompleteParams(prompt="forever"), soon(0.1), on_end=ends.append):
            pass
    assert [type(end) for end in ends] == [type(None), DeadlineExceeded]


async def test_whoever_watches_a_worker_hears_of_its_changes_also_after_it_was_made(make: Make) -> None:
    worker = await make()
    heard: list[ReplicaState] = []
    worker.watchers.append(lambda: heard.append(worker.state))
    await worker.stop(0.0)
    assert heard[0] is ReplicaState.STOPPING
    assert heard[-1] is ReplicaState.STOPPED


async def test_an_observer_that_fails_keeps_no_other_from_hearing(make: Make) -> None:
    worker = await make()
    heard: list[ReplicaState] = []

    def fails() -> None:
        raise RuntimeError("not my day")

    worker.watchers.insert(0, fails)
    worker.watchers.append(lambda: heard.append(worker.state))
    await worker.stop(0.0)
    assert heard[-1] is ReplicaState.STOPPED


async def test_where_no_call_may_wait_those_that_find_a_slot_still_run(make: Make) -> None:
    worker = await make(queue_limit=0)
    assert await collect(worker, CompleteParams(prompt="count 1"))
    running = asyncio.create_task(collect(worker, CompleteParams(prompt="forever")))
    await until(lambda: worker.active_calls == 1)
    with pytest.raises(Overloaded):
        await collect(worker, CompleteParams(prompt="count 1"))
    running.cancel()
    await asyncio.wait([running])


@together
async def test_half_a_surrogate_pair_is_the_callers_error(shared: ReplicaWorker) -> None:
    worker = shared
    with pytest.raises(InvalidParams):
        await collect(worker, CompleteParams(prompt="\ud800"))
    assert await collect(worker, CompleteParams(prompt="count 1"))


@together
async def test_nul_bytes_and_four_mebibytes_pass_through(shared: ReplicaWorker) -> None:
    worker = shared
    vectors = (await collect(worker, EmbedParams(input=["\0", "x" * 4 * 2**20])))[0]
    assert isinstance(vectors, Embedded)
    assert len(vectors.vectors) == 2


async def test_a_bad_file_fails_for_good_without_a_restart_loop(make: Make) -> None:
    worker = await make("bad-file", ready=False)
    with pytest.raises(BadModelFile):
        await worker.wait_ready(20)
    assert worker.state is ReplicaState.FAILED
    assert worker.restarts == 0
    with pytest.raises(BadModelFile):
        await collect(worker, CompleteParams(prompt="count 1"))


@pytest.mark.parametrize("path", ["abort", "raise"])
@pytest.mark.slow
async def test_a_load_that_keeps_crashing_is_given_up_with_a_clear_message(make: Make, path: str) -> None:
    worker = await make(path, ready=False)
    with pytest.raises(ReplicaFailed, match="3 times in a row") as caught:
        await worker.wait_ready(20)
    assert worker.restarts == 2
    assert "secret" not in str(caught.value)


@pytest.mark.slow
async def test_a_worker_that_was_given_up_is_due_after_its_cool_down_and_waits_to_be_asked(make: Make) -> None:
    worker = await make("abort", ready=False, crash_limit=1, cool_down_seconds=0.05)
    with pytest.raises(ReplicaFailed):
        await worker.wait_ready(20)
    await until(lambda: worker.retry_due)
    assert (worker.state, worker.restarts) == (ReplicaState.FAILED, 0)
    await worker.start()
    assert (worker.state, worker.restarts) == (ReplicaState.STARTING, 1)
    await until(lambda: worker.state is ReplicaState.FAILED)


@pytest.mark.slow
async def test_a_load_that_crashed_once_is_tried_again(make: Make, tmp_path: Path) -> None:
    worker = await make(f"crash-once:{tmp_path / 'crashed'}")
    assert worker.restarts == 1


async def test_a_load_without_progress_is_killed(make: Make) -> None:
    worker = await make("stuck", ready=False, start_timeout_seconds=0.3, crash_limit=1)
    with pytest.raises(ReplicaFailed, match="no progress of the load"):
        await worker.wait_ready(20)


async def test_stop_lets_running_calls_end_within_the_grace_and_refuses_new_ones(make: Make) -> None:
    worker = await make()
    stream = worker.run(CompleteParams(prompt="forever"), soon(0.4))
    await anext(stream)
    stopping = asyncio.create_task(worker.stop(20))
    await until(lambda: worker.state is ReplicaState.STOPPING)
    with pytest.raises(Draining):
        await collect(worker, CompleteParams(prompt="count 1"))
    with pytest.raises(DeadlineExceeded):
        [event async for event in stream]
    await stopping
    assert worker.state is ReplicaState.STOPPED


async def test_stop_ends_calls_that_outlast_the_grace(make: Make) -> None:
    worker = await make()
    call = asyncio.create_task(collect(worker, CompleteParams(prompt="forever")))
    await until(lambda: worker.active_calls == 1)
    await worker.stop(0.05)
    with pytest.raises(Draining):
        await call


async def test_stop_kills_a_worker_that_does_not_end(make: Make) -> None:
    worker = await make(stop_seconds=0.2, hang_seconds=20.0)
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        await worker.stop(0)


@pytest.mark.slow
async def test_a_stopped_replica_can_be_started_again(make: Make) -> None:
    worker = await make()
    await worker.stop(0)
    with pytest.raises(TarsError):
        await worker.wait_ready(1)
    await worker.start()
    await worker.wait_ready(20)
    assert await collect(worker, CompleteParams(prompt="count 1"))


@together
async def test_ctrl_c_and_termination_signals_leave_the_worker_to_the_node(shared: ReplicaWorker) -> None:
    worker = shared
    assert worker.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert await collect(worker, CompleteParams(prompt="count 5"))
    assert worker.restarts == 0


async def test_the_worker_sees_no_secret_and_only_its_device(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_API_KEY", "hunter2")
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    worker = await make()
    environment = psutil.Process(worker.pid).environ()
    assert "hunter2" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from tars.workers.engine import LoadSpec
from tars.workers.options import WorkerOptions
from tars.workers.supervisor import ReplicaWorker

async def main():
    options = WorkerOptions(engines={"fake": "fake_engine:FakeEngine"}, environment={"PYTHONPATH": sys.argv[1]})
    worker = ReplicaWorker(LoadSpec(replica="r", model="m", engine="fake", path="ok"), options, lambda worker: None)
    await worker.start()
    await worker.wait_ready(20)
    print(worker.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_node_killed_by_sigkill_leaves_no_orphan() -> None:
    root = str(HERE.parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(HERE)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    ) as node:
        assert node.stdout is not None
        worker = psutil.Process(int(node.stdout.readline()))
        node.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.wait(10)
    assert not worker.is_running()
