"""How long the threads of a decode wait awake for each other: long while the processors are theirs, briefly while other programs need them.

Law of this file: it knows OpenMP's threads and the scheduler's word on them, no model. llama.cpp's threads meet a few hundred times a
token. One that sleeps there is woken late; one that stays awake takes a processor from whoever it waits for, up to a time slice each
time. Measured with 124M parameters on two cores (milliseconds a token, awake for long / briefly): nobody else 7.5 / 8.0, two programs that
need a third of a processor each 11 / 15, two that need all they get 32 to 2,000 / 22. So only the last is answered by waiting briefly, and
the first decode after a rest waits briefly too.

libgomp reads both lengths once, when it is loaded. It waits briefly as long as the process has more of its threads than processors: here as
many are started, and sleep until they are ended. Where there is no libgomp, or no word of the scheduler, nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {
    # Looks before a thread sleeps: libgomp's own length, which it forgets where the next line stands alone.
    "GOMP_SPINCOUNT": "300000",
    # With that, the brief wait is of 1,000 looks instead of 100, with which a token on free processors takes twice as long.
    "OMP_WAIT_POLICY": "active",
    # LLVM's OpenMP takes "active" for "for ever"; this is its own default, milliseconds.
    "KMP_BLOCKTIME": "200",
}
"""What a process that decodes on processors is started with."""

WINDOW_SECONDS = 0.25
"""Of decoding, over which it is looked whether others need the processors."""

CROWDED, ROOMY = 0.4, 0.33
"""Shares of the threads' time that they stood ready without a processor: from the first on the wait is brief, below the second long. Seen
while it is long: beside two programs that need a third of a processor each 0.25, one that needs a whole one 0.35, two 0.5; while it is
brief 0.32, 0.42 and 0.4 to 0.5.
"""

REST_SECONDS = 1.0
"""Without a decode, after which nothing is known of the others: the wait is brief until the first window says that it may be long."""

TASKS, MAPS = Path("/proc/self/task"), Path("/proc/self/maps")


def waited_seconds(tasks: Path = TASKS) -> float | None:
    """How long all threads of this process together stood ready and had no processor (proc(5), schedstat); None where nobody counts."""
    total = 0
    counted = False
    try:
        for task in os.listdir(tasks):
            try:
                total += int((tasks / task / "schedstat").read_text().split()[1])
                counted = True
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended, or this kernel does not count
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9 if counted else None


class SleepingTeam:
    """More threads of libgomp than there are processors, asleep until `end`. Raises `OSError` where this process has no libgomp."""

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        try:
            together = (library or loaded_libgomp()).GOMP_parallel
        except AttributeError:
            raise OSError("what is loaded as libgomp is none") from None
        count = (os.cpu_count() or 1) + 1
        started = threading.Event()
        self._ended = threading.Event()

        def hold() -> None:
            # free(NULL) is the work: native, as threads that Python does not know must do, and nothing.
            nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
            together(nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
            started.set()
            self._ended.wait()  # a team's threads end with the one that started it

        self._holder = threading.Thread(target=hold, name="openmp waits briefly", daemon=True)
        self._holder.start()
        started.wait()

    def end(self) -> None:
        """Let the threads end; returns when they are told."""
        self._ended.set()
        self._holder.join()


def loaded_libgomp(maps: Path = MAPS) -> ctypes.CDLL:
    """This process's. Raises `OSError` where there is none, or where there are several: which one decodes, nobody says."""
    lines = maps.read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    if len(paths) != 1:
        raise OSError(f"{len(paths)} libraries of the name libgomp are loaded, not one")
    return ctypes.CDLL(paths.pop())


class ThreadWaiting:
    """Chooses how long threads wait, for one engine; see the module's law. Used in the engine's thread."""

    def __init__(
        self,
        threads: int,
        waited: Callable[[], float | None] = waited_seconds,
        shorten: Callable[[], SleepingTeam] = SleepingTeam,
    ) -> None:
        """`threads`: of a decode; one alone waits for nobody."""
        self._threads = threads
        self._waited = waited
        self._shorten = shorten
        self._works = threads > 1
        self._decoded, self._before = 0.0, 0.0
        """Decoding and waiting before this window."""
        self._last: tuple[float, float] | None = None
        """The last step's `decoded` and `now`."""
        self._short: SleepingTeam | None = None

    @property
    def brief(self) -> bool:
        """Whether others may need the processors."""
        return self._short is not None

    def look(self, decoded: float, now: float) -> None:
        """Before a step: `decoded` seconds were spent in decodes so far, `now` is of any clock. Costs little until a window is over."""
        if not self._works:
            return
        last, self._last = self._last, (decoded, now)
        if last is None or (now - last[1]) - (decoded - last[0]) > REST_SECONDS:
            if self._short is None:
                self._wait_briefly()
            self._begin_window(decoded)
        elif decoded - self._decoded >= WINDOW_SECONDS:
            before = self._before
            spent = decoded - self._decoded
            self._begin_window(decoded)
            share = (self._before - before) / (spent * self._threads)
            if self._short is None and share >= CROWDED:
                self._wait_briefly()
            elif self._short is not None and share < ROOMY:
                self.close()

    def close(self) -> None:
        """End what sleeps."""
        if self._short is not None:
            self._short.end()
            self._short = None

    def _begin_window(self, decoded: float) -> None:
        waited = self._waited()
        if waited is None:
            self._works = False
            self.close()
        self._decoded, self._before = decoded, waited or 0.0

    def _wait_briefly(self) -> None:
        try:
            self._short = self._shorten()
        except OSError:
            self._works = False
