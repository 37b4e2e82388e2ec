"""One call's machine at work: its effects are done here, and what comes back is told to it.

Law of this file: it decides nothing. What is tried where, given up, continued, asked twice or waited for is `core.call_machine`'s; where a
replica is and how it is reached is the fleet's. Each attempt runs in a task of its own, so that it can be stopped while the caller waits,
and two can run at once; what they bring is read by one caller, in order. A stopped attempt's iterator is closed, which frees its slot.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Any, cast

from tars.core.call_effects import Answer, AskToLoad, AttemptRecord, Effect, Fail, Failure, Start, Stop, Wake
from tars.core.call_machine import CallMachine
from tars.core.replica_ledger import ReplicaLedger
from tars.core.types import ReplicaState
from tars.errors import Cancelled, InternalError, StillLoading, TarsError
from tars.messages.base import CallContext, ResumeMeta, SavedState
from tars.messages.inference import Attempt, ChatParams, CompleteParams, Delta, Generated, Progress, ServedBy
from tars.serving.call_record import CallRecord
from tars.serving.continuation import StreamSoFar
from tars.serving.demand import observed
from tars.serving.failures import failure_of, worth_waiting
from tars.serving.fleet import Fleet
from tars.serving.targets import Target
from tars.workers.engine import Event, Finished, Work

log = logging.getLogger(__name__)

MOST_UNREAD = 64
"""Pieces that wait for a slow caller; then the attempt is read no further, and its own source joins what comes meanwhile."""
LOOK_SECONDS = 1.0
"""A call for which nobody works looks again so often, should a change not have been told."""

_ENDING: set[asyncio.Task[None]] = set()
"""Attempts that answered and read their connection to its end; nobody waits for them, and only this set holds them."""

Routed = tuple[Event, ServedBy] | tuple[Progress, None]
"""What a call's reader gets: events with who they are from, and how far the load is that the call waits for."""


class CallDriver:
    """See the module's law. `begin` once, `next` until it gives None, then `close`, whatever happened.

    `error_of` makes the caller's error of the machine's last word. `work` has its seed where it generates. `may_load`: nobody had deployed
    the model when the call came; what was deployed is loaded without being asked for, or was removed meanwhile, and that counts.
    """

    def __init__(
        self,
        machine: CallMachine,
        fleet: Fleet,
        model: str,
        work: Work,
        call: CallContext,
        now: Callable[[], float],
        error_of: Callable[[Failure, CallDriver], TarsError],
        ledger: ReplicaLedger,
        record: CallRecord | None = None,
        *,
        may_load: bool = False,
    ):
        self.machine = machine
        self.waits_for_load = False
        """Nobody had a replica when it was looked last."""
        self.mistakes: set[int] = set()
        """Attempts (by number) that ended with the caller's own fault."""
        self.at_peers: set[int] = set()
        """Attempts that were sent to another node."""
        self.last_error: TarsError | None = None
        """Of the attempt that failed last."""
        self.model = model
        self.forwarded = call.hops > 0
        self.trace_id = call.trace_id
        self._fleet = fleet
        self._work = work
        self._call = call
        self._now = now
        self._error_of = error_of
        self._ledger = ledger
        self._may_load = may_load
        self._record = record
        self._stream = (
            StreamSoFar(work, now) if isinstance(work, ChatParams | CompleteParams) and not call.hops else None
        )
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stopped: list[asyncio.Task[None]] = []
        self._answered: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._finished: tuple[Finished, Target] | None = None
        self._unread: deque[Routed] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._told: Progress | None = None
        self._error: BaseException | None = None
        self._done = False

    # --- the caller's side -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the first attempt, or wait for one."""
        self._perform(self.machine.begin(self._now()))

    async def next(self) -> Routed | None:
        """What comes next; None after the answer. Raises the call's `TarsError`."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._done:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        item = self._unread.popleft()
        if self._room is not None and not self._unread and not self._room.done():
            self._room.set_result(None)
        return item

    async def close(self) -> None:
        """Stop what still runs; returns when it has ended. Nothing of the call is left behind."""
        self._perform(self.machine.cancelled(self._now()))
        self._settle()
        left = [task for task in (*self._stopped, *self._tasks.values()) if not task.done()]
        for task in left:
            task.cancel()
        if self._answered is not None and not self._answered.done():
            _ENDING.add(self._answered)
            self._answered.add_done_callback(_ENDING.discard)
        if left:
            await asyncio.wait(left)

    def attempts(self) -> list[Attempt]:
        """All so far, for the answer's metadata. Why one was chosen is told where there were several: words cost more than a choice."""
        several = len(self.machine.attempts) > 1
        return [
            Attempt(
                replica=each.replica,
                node=each.node,
                outcome=each.outcome,
                tokens=each.tokens,
                reason=each.reason if several else each.because,
            )
            for each in self.machine.attempts
        ]

    # --- effects -----------------------------------------------------------------------------------------------------

    def _perform(self, effects: Sequence[Effect]) -> None:
        """All of them, and those that they lead to."""
        if not effects:
            return
        pending = deque(effects)
        while pending:
            match pending.popleft():
                case Start() as start:
                    pending.extend(self._start(start))
                case Stop(attempt):
                    self._stop(attempt)
                case Wake(at):
                    self._wake_at(at)
                case AskToLoad():
                    self._ask_to_load()
                case Answer(attempt):
                    self._answer(self.machine.attempts[attempt])
                case Fail(failure):
                    self._end(self._error_of(failure, self))
        if self.machine.over or self._tasks:
            self._settle()
        elif self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def _start(self, start: Start) -> Sequence[Effect]:
        self.waits_for_load = False
        if not start.reservation.local:
            self.at_peers.add(start.attempt)
        try:
            target = self._fleet.target(start.reservation.replica)
        except KeyError:
            gone = Failure("stale_route")  # it went away between two looks
            return self.machine.failed(start.attempt, gone, self._now())
        except TarsError as error:
            self.last_error = error
            # No way there is known: nothing was sent.
            return self.machine.failed(start.attempt, replace(failure_of(error), sent=False), self._now())
        run = self._run(start.attempt, target, self._resume(start))
        self._tasks[start.attempt] = asyncio.create_task(run)
        return ()

    def _resume(self, start: Start) -> ResumeMeta | None:
        if self._call.hops:
            return self._call.resume
        if self._stream is None:
            return None
        if start.resume is None:
            if any(self._stream.tokens):
                # Begun anew, in another file: nobody has seen what came so far.
                assert isinstance(self._work, ChatParams | CompleteParams)
                self._stream = StreamSoFar(self._work, self._now)
            return None
        resume = self._resumed(self._stream, start.saved)
        return None if resume is None else resume.model_copy(update={"file_sha256": start.file_sha256})

    def _resumed(self, stream: StreamSoFar, saved: object) -> ResumeMeta | None:
        if isinstance(saved, dict):
            try:
                return stream.resume(SavedState.model_validate(saved["saved"]), saved.get("tokens"))
            except ValueError:
                log.warning("call %s: a peer saved its state in a form that is not known here", self._call.trace_id)
        return stream.resume()

    def _stop(self, attempt: int) -> None:
        task = self._tasks.pop(attempt, None)
        if task is not None and not task.done():
            self._stopped.append(task)
            if task is not asyncio.current_task():
                task.cancel()

    def _ask_to_load(self) -> None:
        self.waits_for_load = True
        if self._watching is not None:
            self._stop_watching()  # it waits for something else

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._now()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        try:
            self._perform(self.machine.tick(self._now()))
        except Exception as fault:  # noqa: BLE001 - raised again, in the task of whoever reads
            self._end(fault)

    def _settle(self) -> None:
        """Nothing is waited for any more but attempts, or nothing at all."""
        if self._watching is not None and self._watching is not asyncio.current_task():
            self._stop_watching()
        if self.machine.over and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_watching(self) -> None:
        assert self._watching is not None
        self._watching.cancel()
        self._stopped.append(self._watching)
        self._watching = None

    def _answer(self, record: AttemptRecord) -> None:
        assert self._finished is not None
        event, target = self._finished
        if self._stream is not None and self.machine.continuations and isinstance(event, Generated):
            event = self._stream.merged(event)
        served_by = target.served_by
        if served_by.calls_left is not None:
            self._ledger.told([(served_by.replica, served_by.calls_left, 0)], self._now())
        # The peer that asked routes by it; nobody else needs it.
        left = self._ledger.in_flight(record.replica) if self._call.hops else None
        if self._record is not None:
            self._record.answered()
        self._done = True
        self._give((event, served_by.model_copy(update={"attempts": self.attempts(), "calls_left": left})))

    def _end(self, error: BaseException) -> None:
        self._error = error
        self._wake_reader()

    def _give(self, item: Routed) -> None:
        self._unread.append(item)
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- an attempt --------------------------------------------------------------------------------------------------

    async def _run(self, number: int, target: Target, resume: ResumeMeta | None) -> None:
        """Reads one attempt to its end. What it brings after it was stopped goes nowhere."""
        try:
            events = cast("AsyncGenerator[Event]", target.run(self._work, self._call, resume))
            async with aclosing(events):
                async for event in events:
                    if number not in self._tasks:
                        return
                    if isinstance(event, Delta):
                        self._came(number, event, target)
                        if len(self._unread) >= MOST_UNREAD:
                            await self._until_read()
                    else:
                        self._has_finished(number, event, target)
                        # On to its end: a connection whose answer was read to the end serves the next call, too.
            if number in self._tasks:
                self._failed(number, InternalError("the worker ended without an answer"))
        except TarsError as error:
            self._failed(number, error)
        except asyncio.CancelledError:
            if self._tasks.pop(number, None) is not None:
                # Not stopped by this call: the loop ends.
                self._end(Cancelled("The node is ending; the work was stopped. Send the call again."))
            raise
        except Exception as fault:  # noqa: BLE001 - raised again, in the task of whoever reads
            # A bug: whoever logs it wants the traceback, so it goes to the caller's task as it is.
            if number in self._tasks:
                del self._tasks[number]
                self._end(fault)

    def _came(self, number: int, delta: Delta, target: Target) -> None:
        self._perform(self.machine.tokens(number, delta.index, delta.token_ids, self._now()))
        if self._stream is not None:
            self._stream.take(delta)
        self._give((delta, target.served_by))

    async def _until_read(self) -> None:
        """The caller reads slowly: it is waited for, and no replica is late meanwhile."""
        self.machine.caller_reads()
        self._room = asyncio.get_running_loop().create_future()
        await self._room
        self.machine.caller_waits(self._now())

    def _has_finished(self, number: int, event: Finished, target: Target) -> None:
        now = self._now()
        self._answered = self._tasks.pop(number)
        self._finished = (event, target)
        seen = observed(event, now - self.machine.attempts[number].started)
        self._perform(self.machine.finished(number, seen, now))

    def _failed(self, number: int, error: TarsError) -> None:
        if self._tasks.pop(number, None) is None:
            return
        failure = failure_of(error)
        if failure.callers_fault:
            self.mistakes.add(number)
        self.last_error = error
        self._perform(self.machine.failed(number, failure, self._now()))

    # --- waiting for a replica ---------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Nobody works on the call: have a replica loaded where there is none, and look whenever something changed."""
        what = "load" if self.waits_for_load else "backoff"
        waiting: Any = nullcontext() if self._record is None else self._record.waiting(what)
        with waiting:
            try:
                if self.waits_for_load and self._may_load:
                    await self._fleet.ask_to_load(self.model)
                while not (self.machine.over or self._tasks):
                    if self.waits_for_load:
                        self._look()
                    try:
                        async with asyncio.timeout(LOOK_SECONDS):
                            await self._fleet.wait_change()
                    except TimeoutError:
                        pass
                    self._perform(self.machine.fleet_changed(self._now()))
            except TarsError as error:
                # Who has a part of the answer hears what broke it: that is worth a retry, whatever will not be loaded here.
                broken = self.last_error if any(each.tokens for each in self.machine.attempts) else None
                self._perform(self.machine.refused_to_load(failure_of(broken or error), self._now()))
            except Exception as fault:  # noqa: BLE001 - raised again, in the task of whoever reads
                self._end(fault)
        if self._watching is asyncio.current_task():
            self._watching = None

    def _look(self) -> None:
        """Tell the caller how far the load is. Raises why none will come."""
        error = self._fleet.not_ready(self.model)
        ready = any(each.state is ReplicaState.READY for each in self._fleet.candidates(self.model))
        if not ready and not worth_waiting(error):
            raise error
        if isinstance(error, StillLoading) and "stage" in error.details:
            progress = Progress(
                stage=str(error.details["stage"]),
                percent=float(error.details.get("percent", 0.0)),
                node=str(error.details.get("node_name", "")),
            )
            if progress != self._told:
                self._told = progress
                self._give((progress, None))
