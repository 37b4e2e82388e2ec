"""One replica's worker, as the node uses it: start it, call it, let it be restarted, stop it.

Law of this file: the driver of `lifecycle.py`. It performs that machine's effects on a `child.Child`, hands its calls over and their
events back, and decides nothing about restarts itself. Everything runs in one event loop, without a lock: no method awaits between
reading and writing the same state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tars.core.types import Deadline, ReplicaState
from tars.errors import (
    CallerError,
    Draining,
    InvalidParams,
    ReplicaFailed,
    StillLoading,
    TarsError,
    WorkerCrashed,
    from_json,
)
from tars.messages.inference import Delta, GenerationParams
from tars.messages.node import EngineCounters, LoadedInfo, LoadProgress
from tars.workers import lifecycle, protocol
from tars.workers.calls import Call, CallHandle, OnEnd, too_late
from tars.workers.calls_in_flight import CallsInFlight
from tars.workers.child import Child, child_environment
from tars.workers.engine import Event, Finished, LoadSpec, Resume, Saved, SaveParams, Work
from tars.workers.lifecycle import Lifecycle
from tars.workers.options import WorkerOptions
from tars.workers.stdio import frame

log = logging.getLogger("tars.worker")

LOAD_REQUEST = 0
"""Id of `worker.load` on every child's pipe; calls count on from `_FIRST_CALL` and are never reused in a supervisor's life."""

PING_REQUEST = 1

_FIRST_CALL = 2


@dataclass(frozen=True, slots=True)
class SavedSequence:
    """A running answer's state, out of the engine. The file is its receiver's, who deletes it."""

    path: Path
    saved: Saved


class ReplicaWorker:
    """A replica and the worker that holds it, over all the worker's restarts.

    `on_change` is called (in the event loop, synchronously) when `state`, `progress`, `info` or `last_error` changed. `device_busy` says
    whether something else loads or ends on the worker's device; it may be set later.
    """

    def __init__(
        self,
        spec: LoadSpec,
        options: WorkerOptions,
        on_change: Callable[[ReplicaWorker], None],
        device_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.spec = spec
        self.device_busy = device_busy
        self.options = options
        self.watchers: list[Callable[[], None]] = [lambda: on_change(self)]
        """Called as `on_change` is: for those who come after the worker was made."""
        self._lifecycle = Lifecycle(options.limits())
        self._child: Child | None = None
        self._calls = CallsInFlight(_FIRST_CALL)
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._changed = asyncio.Event()
        self._load_started = 0.0
        self._pong: protocol.Pong | None = None
        self._epitaph: list[str] = []

    # --- what can be read ---

    @property
    def state(self) -> ReplicaState:
        """Where the replica stands."""
        inner = self._lifecycle.state
        return ReplicaState.STOPPING if self._draining and inner is not ReplicaState.STOPPED else inner

    @property
    def progress(self) -> LoadProgress | None:
        """How far the load is; None while none is under way."""
        return self._lifecycle.progress

    @property
    def info(self) -> LoadedInfo | None:
        """What was loaded; None while nothing is."""
        return self._lifecycle.info

    @property
    def retry_due(self) -> bool:
        """FAILED, and `start` would try once more: only whoever places the loads knows when its device is free for one."""
        return self._lifecycle.retry_due

    @property
    def restarts(self) -> int:
        """How often the worker was started again."""
        return self._lifecycle.restarts

    @property
    def last_error(self) -> TarsError | None:
        """Why the worker ended last time, or could not load."""
        return self._lifecycle.last_error

    @property
    def pid(self) -> int | None:
        """The worker's process id; None where none runs."""
        return self._child.pid if self._child is not None else None

    @property
    def memory_bytes(self) -> int | None:
        """Bytes that the worker holds now (its last pong's word); None before the first."""
        return self._pong.memory_bytes if self._pong is not None else None

    @property
    def counters(self) -> EngineCounters | None:
        """What the engine did since it was loaded, at most a ping interval ago; None before the first pong. Restarts begin anew."""
        return self._pong.counters if self._pong is not None else None

    @property
    def last_lines(self) -> list[str]:
        """The worker's last printed lines, for the operator's eyes only: they may hold paths."""
        return list(self._child.last_lines) if self._child is not None else self._epitaph

    @property
    def calls_total(self) -> int:
        """Calls that the worker ever got."""
        return self._calls.total

    @property
    def active_calls(self) -> int:
        """Calls that the engine serves now: those that have at least one slot.

        Counted here; only that the KV cache holds fewer sequences than there are slots is known to nobody but the engine, which then says
        that some wait.
        """
        counters, slots = self.counters, self._slots
        if counters is not None and counters.waiting and 0 < counters.running < slots:
            slots = counters.running
        return self._calls.served(slots)

    @property
    def queued_calls(self) -> int:
        """Calls that wait for a slot."""
        return len(self._calls) - self.active_calls

    @property
    def _slots(self) -> int:
        return self.info.slots if self.info is not None else 1

    # --- life ---

    async def start(self) -> None:
        """Start the worker, or try a failed one again whose retry is due; returns at once, loading goes on."""
        self._draining = False
        self._happened(lifecycle.StartAsked())

    async def wait_ready(self, timeout: float) -> LoadedInfo:
        """Until it is READY, at most `timeout` seconds. Raises the load's error once FAILED, `Draining` once stopped, else
        `StillLoading` (or `WorkerCrashed` during a backoff).
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.state not in (ReplicaState.READY, ReplicaState.FAILED, ReplicaState.STOPPED):
                    self._changed.clear()
                    await self._changed.wait()
        if self.state is not ReplicaState.READY:
            raise self._not_ready()
        assert self.info is not None
        return self.info

    async def stop(self, grace: float) -> None:
        """Take no more calls, give the running ones `grace` seconds, then end the worker. Safe to call twice."""
        self._draining = True
        self._notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._calls.wait_until_idle()
        self._fail_calls(Draining("The replica is being stopped. Send the call to another one, or again later."))
        self._happened(lifecycle.StopAsked())
        while (child := self._child) is not None:
            await child.wait()

    # --- calls ---

    async def run(
        self,
        work: Work,
        deadline: Deadline,
        *,
        resume: Resume | None = None,
        handle: CallHandle | None = None,
        on_end: OnEnd | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Any number of `Delta`, then one finished event. Closing the iterator cancels the work in the engine.

        `resume` goes on with an answer that was broken off elsewhere; `handle` names the call for `save`; `on_end` hears when the
        engine is done with it. A caller who reads slowly may get several deltas as one. Raises `StillLoading`, `Overloaded`,
        `WorkerCrashed`, `Draining`, `ReplicaFailed`, `DeadlineExceeded`, or the engine's error.
        """
        number, call = self._begin(work, deadline, resume, on_end)
        if handle is not None:
            handle.number = number
        try:
            while True:
                event = await call.next()
                if isinstance(event, TarsError):
                    raise event
                yield event
                if not isinstance(event, Delta):
                    return
        finally:
            self._end(number, call)

    async def save(self, handle: CallHandle, deadline: Deadline) -> SavedSequence:
        """Write a running answer's state to a new file that only this user can read, and end its call with `Draining`.

        Also while the replica is being stopped: that is when answers leave it. Raises `CallerError` where that call does not run here or
        has no state, and what `run` raises; then no file is left. What was generated before reaches the caller of `run` before its
        `Draining`.
        """
        number, call = handle.number, self._calls.get(handle.number)
        if number is None or call is None or not call.open or not isinstance(call.work, GenerationParams):
            raise CallerError("This call is not running here, or is not a generation: there is no state to save.")
        path = _state_file(self.options.saved_folder)
        try:
            async with contextlib.aclosing(self.run(SaveParams(sequence=number, path=str(path)), deadline)) as events:
                async for event in events:
                    assert isinstance(event, Saved), "the only event that ends a save"
                    return SavedSequence(path, event)
            raise AssertionError("a call without an end")
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def break_off(self, handle: CallHandle, error: TarsError) -> None:
        """End a call with `error`, after what has come of it until now; its work in the engine is cancelled. One that has ended is none."""
        if (call := self._calls.get(handle.number)) is not None:
            call.fail(error)

    def _begin(self, work: Work, deadline: Deadline, resume: Resume | None, on_end: OnEnd | None) -> tuple[int, Call]:
        state = self._lifecycle.state if isinstance(work, SaveParams) else self.state
        if state is not ReplicaState.READY or self._child is None:
            raise self._not_ready()
        width = 0 if isinstance(work, SaveParams) else work.n if isinstance(work, GenerationParams) else 1
        if width:
            self._calls.refuse_beyond(self.options.queue_limit, self._slots)
        remaining = deadline.remaining(time.monotonic())
        if remaining <= 0:
            raise too_late()
        params = {"work": work.model_dump(exclude_unset=True), "timeout_ms": max(1, int(remaining * 1000))}
        if resume is not None:
            params["resume"] = resume.model_dump()
        try:
            data = frame(protocol.request(self._calls.next_number, protocol.METHOD_OF[type(work)], params))
        except TypeError:
            raise InvalidParams(
                "The call holds something that JSON cannot carry: half of a surrogate pair, an integer over 64 bits, "
                "or more than 250 levels of nesting. Take it out."
            ) from None
        number, call = self._calls.add(work, remaining, width, on_end)
        self._child.send_bytes(data)
        return number, call

    def _end(self, number: int, call: Call) -> None:
        call.close()
        was_known = self._calls.remove(number) is not None
        if call.open and was_known and self._child is not None:
            self._child.send(protocol.notification(protocol.CANCEL, {"id": number}))
        self._calls.lasted(time.monotonic() - call.started)

    def _not_ready(self) -> TarsError:
        """Why no call can be taken now."""
        now = time.monotonic()
        retry_after_ms = int(self._lifecycle.retry_after(now) * 1000)
        match self.state:
            case ReplicaState.STOPPING | ReplicaState.STOPPED:
                return Draining(
                    "The replica is stopped or being stopped. Send the call to another one, or again later."
                )
            case ReplicaState.FAILED:
                return self.last_error or ReplicaFailed("The replica could not be loaded. See `tars status`.")
            case ReplicaState.RESTARTING:
                return WorkerCrashed(
                    "The worker of this model ended and is being restarted. Send the call again.",
                    retry_after_ms=retry_after_ms,
                    details={"sent": False},
                )
            case _:
                progress = self.progress or LoadProgress(stage="spawn", percent=0.0)
                return StillLoading(
                    f"The model is still loading (stage {progress.stage}, {progress.percent:.0f} %). Send the call again later.",
                    retry_after_ms=_load_left_ms(progress.percent, now - self._load_started),
                    details={"stage": progress.stage, "percent": round(progress.percent, 1)},
                )

    def _fail_calls(self, error: TarsError) -> None:
        for number, call in self._calls.remove_all().items():
            call.fail(error)
            if self._child is not None and self._lifecycle.state is ReplicaState.READY:
                self._child.send(protocol.notification(protocol.CANCEL, {"id": number}))

    # --- the lifecycle's driver ---

    def _happened(self, event: lifecycle.Happening) -> None:
        before = self._visible()
        for effect in self._lifecycle.handle(event, time.monotonic()):
            self._perform(effect)
        self._set_timer()
        if self._visible() != before:
            self._notify()

    def _visible(self) -> tuple[object, ...]:
        machine = self._lifecycle
        return (machine.state, machine.progress, machine.info, machine.last_error, machine.restarts, machine.retry_due)

    def _notify(self) -> None:
        self._changed.set()
        for watcher in self.watchers:
            try:
                watcher()
            except Exception:
                log.exception("%s: an observer of this worker failed", self.spec.replica)

    def _perform(self, effect: lifecycle.Effect) -> None:
        match effect:
            case lifecycle.Spawn():
                self._spawn()
            case lifecycle.SendPing():
                self._send(protocol.request(PING_REQUEST, protocol.PING, {}))
            case lifecycle.SendShutdown():
                self._send(protocol.notification(protocol.SHUTDOWN, {}))
            case lifecycle.Kill(cause):
                log.warning("%s: killing the worker: %s", self.spec.replica, cause)
                if self._child is not None:
                    self._child.kill()
            case lifecycle.FailCalls(error):
                self._fail_calls(error)

    def _send(self, message: dict[str, Any]) -> None:
        if self._child is not None:
            self._child.send(message)

    def _spawn(self) -> None:
        engine = self.options.engines.get(self.spec.engine)
        assert engine is not None, f"no engine is called {self.spec.engine}"
        self._load_started = time.monotonic()
        environment = child_environment(self.spec, os.environ, self.options.environment)
        child = Child(
            self.spec,
            engine,
            environment,
            lambda message: self._receive(child, message),
            lambda cause: self._ended(child, cause),
            self.options.step_patience(),
            self.options.nice,
        )
        self._child = child
        child.send(protocol.request(LOAD_REQUEST, protocol.LOAD, self.spec.model_dump()))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at := self._lifecycle.next_wake()) is not None:
            delay = max(0.0, at - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        self._happened(lifecycle.Tick(self.device_busy()))

    def _ended(self, child: Child, cause: str) -> None:
        if child is not self._child:
            return
        self._epitaph = list(child.last_lines)
        if self._lifecycle.state in lifecycle.RUNNING:
            # With its lines: a log for people shows warnings only, and the error sends them here.
            lines = "".join(f"\n    {line}" for line in self._epitaph)
            log.warning("%s: the worker ended: %s; it printed last:%s", self.spec.replica, cause, lines or " nothing")
        self._child = None
        self._pong = None
        self._happened(lifecycle.ProcessEnded(cause))

    def _receive(self, child: Child, message: dict[str, Any]) -> None:
        if child is not self._child:
            return
        number, method = message.get("id"), message.get("method")
        if method == protocol.STEP:
            for row in message["params"]:
                if (step_of := self._calls.get(row[0])) is not None:
                    step_of.add(row)
        elif method == protocol.PROGRESS:
            progress = LoadProgress.model_validate(message["params"])
            self._happened(lifecycle.Progressed(progress.stage, progress.percent))
        elif number == PING_REQUEST and "result" in message:
            self._pong = protocol.Pong.model_validate(message["result"])
            self._happened(lifecycle.PingAnswered(self._pong.mark, self._pong.in_flight))
        elif number == LOAD_REQUEST:
            self._load_answered(message)
        elif isinstance(number, int) and (call := self._calls.remove(number)) is not None:
            # It counts no longer, however slowly its caller reads.
            call.finish(_end_event(call.work, message))

    def _load_answered(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self._happened(lifecycle.LoadFailed(from_json(message["error"])))
        else:
            info = LoadedInfo.model_validate(message["result"])
            # What this load measured, the next one after a crash need not.
            self.spec = self.spec.model_copy(update={"tuned": info.tuned})
            self._happened(lifecycle.Loaded(info))


def _end_event(work: Work, message: dict[str, Any]) -> Finished | TarsError:
    if "error" in message:
        return from_json(message["error"])
    return protocol.RESULT_OF[type(work)].model_validate(message["result"])


def _state_file(folder: Path | None) -> Path:
    """A new empty file with mode 0600 from its first moment: the engine's library would make one that all can read."""
    if folder is not None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="sequence-", suffix=".state", dir=folder)
    os.close(descriptor)
    return Path(name)


def _load_left_ms(percent: float, elapsed: float) -> int:
    """Time left by the rule of three, between half a second and half a minute: early percents say little."""
    left = elapsed * (100.0 - percent) / percent if percent > 0 else 5.0
    return int(min(30.0, max(0.5, left)) * 1000)
