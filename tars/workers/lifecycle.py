"""When a worker is started, pinged, judged hung, killed, restarted or given up.

Law of this file: pure. `handle(event, now)` takes what happened and the time, and returns the effects that a driver (`supervisor.py`)
performs; no process, no pipe and no clock is known here. `now` is a monotonic clock in seconds.

The rules, in words:
- A load that cannot heal (`retryable` is False on its error: a corrupt file) is FAILED at once: a person must act. So is one that ran out
  of memory, but whoever has that may give it back: it is tried again as below.
- Everything else restarts after `backoff_initial * 2**(n-1)` seconds, at most `backoff_most`, n the quick crashes in a row. A worker that
  stayed READY for `stable` seconds has its count forgiven.
- After `crash_limit` quick crashes in a row it is FAILED, and may be tried again once after every `cool_down` seconds: nobody is on call,
  and a driver update or freed memory may have healed it. That try is asked for (`StartAsked`) by whoever sees to it that loads on one
  device come one at a time; here it only becomes due (`retry_due`).
- A restart waits while something else loads or ends on its device, as ordered loads do: two at once would want the same memory, and each
  would measure the other's.
- Hung is: no answer to a ping for `hang` seconds (a stopped or swapped-out process), or calls in flight while the engine's progress mark
  stands still that long (a dead kernel, an endless grammar). A hung worker is killed; what follows is the same as after a crash.
- While it imports or starts, native code may hold the interpreter for long: there the patience is `start_timeout`, as it is for a load
  that shows no progress.
- If the node itself slept, the worker is not to blame: a gap between two ticks starts all patience anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from tars.core.types import ReplicaState
from tars.errors import DoesNotFit, ReplicaFailed, TarsError, WorkerCrashed
from tars.messages.node import LoadedInfo, LoadProgress

# --- what happens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartAsked:
    """Somebody wants this replica."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Nobody wants it any longer; running calls were given their grace before."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """The load got on."""

    stage: str
    percent: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model answers."""

    info: LoadedInfo


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The worker said that it cannot load."""

    error: TarsError


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """The child's event loop lives; `mark` is its engine's progress, `in_flight` its unfinished calls."""

    mark: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """The process is gone. `cause` is for people: `signal SIGKILL`, `exit code 1`; no path, no secret."""

    cause: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; comes at least every `Limits.ping_interval` seconds."""

    device_busy: bool = False
    """Something else loads or ends on the worker's device just now: a restart that is due waits."""


Happening = StartAsked | StopAsked | Progressed | Loaded | LoadFailed | PingAnswered | ProcessEnded | Tick

# --- what is to be done ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the child and send it `worker.load`."""


@dataclass(frozen=True, slots=True)
class SendPing:
    """Send `worker.ping`."""


@dataclass(frozen=True, slots=True)
class SendShutdown:
    """Ask the child to end."""


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL, which also ends a stopped process."""

    cause: str


@dataclass(frozen=True, slots=True)
class FailCalls:
    """End every call in flight with this error."""

    error: TarsError


Effect = Spawn | SendPing | SendShutdown | Kill | FailCalls


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds; see the module's law."""

    start_timeout: float
    ping_interval: float
    hang: float
    backoff_initial: float
    backoff_most: float
    stop: float
    stable: float
    crash_limit: int
    cool_down: float


LEGAL: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.STOPPED: frozenset({ReplicaState.STARTING}),
    ReplicaState.STARTING: frozenset(
        {ReplicaState.LOADING, ReplicaState.READY, ReplicaState.RESTARTING, ReplicaState.FAILED, ReplicaState.STOPPING}
    ),
    ReplicaState.LOADING: frozenset(
        {ReplicaState.READY, ReplicaState.RESTARTING, ReplicaState.FAILED, ReplicaState.STOPPING}
    ),
    ReplicaState.READY: frozenset({ReplicaState.RESTARTING, ReplicaState.FAILED, ReplicaState.STOPPING}),
    ReplicaState.RESTARTING: frozenset({ReplicaState.STARTING, ReplicaState.STOPPING, ReplicaState.STOPPED}),
    ReplicaState.FAILED: frozenset({ReplicaState.STARTING, ReplicaState.STOPPING, ReplicaState.STOPPED}),
    ReplicaState.STOPPING: frozenset({ReplicaState.STOPPED}),
}
"""Which state may follow which; everything else is a bug."""

BUSY_SECONDS = 0.25
"""A restart whose device is busy looks again after so long."""

RUNNING = frozenset({ReplicaState.STARTING, ReplicaState.LOADING, ReplicaState.READY})
"""The states in which the child is meant to be alive."""

SLOW_STAGES = frozenset({"spawn", "import"})
"""Stages in which native code (dlopen of a 1.5 GB library from a cold disk) may keep the child's event loop from answering."""


def backoff(limits: Limits, quick_crashes: int) -> float:
    """Seconds until the next start after so many quick crashes in a row (at least one): doubling, capped."""
    # The exponent is bounded too: 2.0**1024 overflows.
    return float(min(limits.backoff_initial * 2.0 ** min(quick_crashes - 1, 60), limits.backoff_most))


class Lifecycle:
    """One worker's life: `handle` is its only entry, the attributes are for reading."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.state = ReplicaState.STOPPED
        self.progress: LoadProgress | None = None
        self.info: LoadedInfo | None = None
        self.restarts = 0
        self.last_error: TarsError | None = None
        self.restart_at: float | None = None
        """When the next start is due, None where none is."""
        self.retry_due = False
        """FAILED by crashes or for want of memory, and its cool-down is over: `StartAsked` tries once more."""
        self._alive = False
        self._quick_crashes = 0
        self._ready_since = 0.0
        self._kill_cause: str | None = None
        self._stop_until: float | None = None
        self._last_tick: float | None = None
        self._ping_sent: float | None = None
        """When the unanswered ping was sent; None where none is."""
        self._ping_due = 0.0
        """When to look next: a ping is sent then, unless one is unanswered."""
        self._load_moved = 0.0
        self._mark: tuple[int, float] = (-1, 0.0)
        """The engine's progress mark and when it last moved (or nothing was in flight)."""

    def handle(self, event: Happening, now: float) -> list[Effect]:
        """What to do about `event`."""
        match event:
            case StartAsked():
                return self._start_asked(now)
            case StopAsked():
                return self._stop(now)
            case Progressed(stage, percent):
                return self._progressed(stage, percent, now)
            case Loaded(info):
                return self._loaded(info, now)
            case LoadFailed(error):
                return self._load_failed(error, now)
            case PingAnswered(mark, in_flight):
                return self._ping_answered(mark, in_flight, now)
            case ProcessEnded(cause):
                return self._ended(cause, now)
            case Tick(device_busy):
                return self._tick(now, device_busy)

    def next_wake(self) -> float | None:
        """When `Tick` is due next; None while nothing can happen by time alone."""
        if self.state in RUNNING:
            if self._kill_cause is not None:
                return None
            return self._ping_due
        if self.state is ReplicaState.STOPPING:
            return self._stop_until
        return self.restart_at

    def retry_after(self, now: float) -> float:
        """Seconds after which a caller may try again: the rest of the backoff, or one second while it is under way."""
        return max(1.0, self.restart_at - now) if self.restart_at is not None else 1.0

    # --- one rule each ---

    def _enter(self, state: ReplicaState) -> None:
        if state is self.state:
            return
        assert state in LEGAL[self.state], f"{self.state} -> {state}"
        self.state = state

    def _start_asked(self, now: float) -> list[Effect]:
        if self.state is ReplicaState.STOPPED:
            return self._start(now)
        if not self.retry_due:
            return []
        self.restarts += 1
        return self._start(now)

    def _start(self, now: float) -> list[Effect]:
        self._enter(ReplicaState.STARTING)
        self.retry_due = False
        self.progress = LoadProgress(stage="spawn", percent=0.0)
        self.info = None
        self.restart_at = None
        self._alive = True
        self._kill_cause = None
        self._be_patient(now)
        self._ping_due = now + self.limits.ping_interval
        return [Spawn()]

    def _be_patient(self, now: float) -> None:
        self._ping_sent = None
        self._load_moved = now
        self._mark = (-1, now)

    def _stop(self, now: float) -> list[Effect]:
        if self.state in (ReplicaState.STOPPING, ReplicaState.STOPPED):
            return []
        self.restart_at = None
        self.retry_due = False
        self.progress = None
        if not self._alive:
            self._enter(ReplicaState.STOPPED)
            return []
        self._enter(ReplicaState.STOPPING)
        self._stop_until = now + self.limits.stop
        return [SendShutdown()]

    def _progressed(self, stage: str, percent: float, now: float) -> list[Effect]:
        if self.state in (ReplicaState.STARTING, ReplicaState.LOADING):
            self._enter(ReplicaState.LOADING)
            self.progress = LoadProgress(stage=stage, percent=min(100.0, max(0.0, percent)))
            self._load_moved = now
        return []

    def _loaded(self, info: LoadedInfo, now: float) -> list[Effect]:
        if self.state in (ReplicaState.STARTING, ReplicaState.LOADING):
            self._enter(ReplicaState.READY)
            self.info = info
            self.progress = None
            self._ready_since = now
            self._mark = (-1, now)
        return []

    def _load_failed(self, error: TarsError, now: float) -> list[Effect]:
        if self.state not in (ReplicaState.STARTING, ReplicaState.LOADING):
            return []
        self.last_error = error
        self.progress = None
        if error.retryable:
            return self._kill("the load failed")
        self._enter(ReplicaState.FAILED)
        if isinstance(error, DoesNotFit):
            self.restart_at = now + self.limits.cool_down
        return [SendShutdown(), Kill("the load failed for good")]

    def _ping_answered(self, mark: int, in_flight: int, now: float) -> list[Effect]:
        self._ping_sent = None
        self._ping_due = now + self.limits.ping_interval
        if in_flight == 0 or mark != self._mark[0]:
            self._mark = (mark, now)
        return []

    def _ended(self, cause: str, now: float) -> list[Effect]:
        self._alive = False
        cause = self._kill_cause or cause
        if self.state is ReplicaState.STOPPING:
            self._enter(ReplicaState.STOPPED)
            return []
        if self.state not in RUNNING:
            return []
        was_ready = self.state is ReplicaState.READY
        stable = was_ready and now - self._ready_since >= self.limits.stable
        self._quick_crashes = 1 if stable else self._quick_crashes + 1
        self.progress = None
        self.info = None
        if not (self._kill_cause == "the load failed" and self.last_error is not None):
            self.last_error = _crash_error(cause, was_ready)
        if self._quick_crashes >= self.limits.crash_limit:
            self._enter(ReplicaState.FAILED)
            self.restart_at = now + self.limits.cool_down
            self.last_error = _given_up(cause, self._quick_crashes, was_ready, self.limits.cool_down)
            calls_error: TarsError = self.last_error
        else:
            self._enter(ReplicaState.RESTARTING)
            self.restart_at = now + backoff(self.limits, self._quick_crashes)
            calls_error = WorkerCrashed(
                f"The worker that had this call ended ({cause}); it is being restarted. Send the call again.",
                retry_after_ms=int(self.retry_after(now) * 1000),
            )
        return [FailCalls(calls_error)]

    def _tick(self, now: float, device_busy: bool) -> list[Effect]:
        slept = self._last_tick is not None and now - self._last_tick > 2 * self.limits.ping_interval + 1.0
        self._last_tick = now
        if self.state in (ReplicaState.RESTARTING, ReplicaState.FAILED):
            if self.restart_at is None or now < self.restart_at or self._alive:
                return []
            if self.state is ReplicaState.FAILED:
                self.restart_at = None
                self.retry_due = True
                return []
            if device_busy:
                self.restart_at = now + BUSY_SECONDS
                return []
            self.restarts += 1
            return self._start(now)
        if self.state is ReplicaState.STOPPING:
            if self._stop_until is None or now < self._stop_until:
                return []
            self._stop_until = None
            return [Kill("it did not end when asked")]
        if self.state not in RUNNING or self._kill_cause is not None:
            return []
        if slept:
            self._be_patient(now)
        if (cause := self._hung(now)) is not None:
            return self._kill(cause)
        if now < self._ping_due:
            return []
        # Moved on while an answer is outstanding too: a wake in the past would have the driver look without a pause.
        self._ping_due = now + self.limits.ping_interval
        if self._ping_sent is not None:
            return []
        self._ping_sent = now
        return [SendPing()]

    def _hung(self, now: float) -> str | None:
        limits = self.limits
        loading = self.state is not ReplicaState.READY
        if loading and now - self._load_moved >= limits.start_timeout:
            return f"no progress of the load for {limits.start_timeout:g} s"
        slow = self.progress is not None and self.progress.stage in SLOW_STAGES
        patience = limits.start_timeout if slow else limits.hang
        if self._ping_sent is not None and now - self._ping_sent >= patience:
            return f"no answer for {patience:g} s"
        if not loading and now - self._mark[1] >= limits.hang and self._ping_sent is None:
            return f"calls without progress for {limits.hang:g} s"
        return None

    def _kill(self, cause: str) -> list[Effect]:
        self._kill_cause = cause
        return [Kill(cause)]


def _crash_error(cause: str, was_ready: bool) -> TarsError:
    when = "while it served" if was_ready else "while it loaded the model"
    return WorkerCrashed(f"The worker process ended {when} ({cause}). It restarts by itself.")


def _given_up(cause: str, crashes: int, was_ready: bool, cool_down: float) -> ReplicaFailed:
    hint = (
        "Look at the worker's last lines in the node's log."
        if was_ready
        else "The model file may be damaged, or memory too small: look at the worker's last lines in the node's log."
    )
    return ReplicaFailed(
        f"The worker process ended {crashes} times in a row (last: {cause}). The next try comes in {cool_down:g} s. {hint}",
        retry_after_ms=int(cool_down * 1000),
    )
