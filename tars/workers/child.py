"""One worker process, seen from the node: spawn, send, receive, kill.

Law of this file: it moves messages and reports the end; whether to restart, wait or give up is decided in `lifecycle.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tars.workers import thread_waiting
from tars.workers.engine import LoadSpec
from tars.workers.stdio import READ_SIZE, FramingError, MessageReader, frame
from tars.workers.watchdog import ABORT_SECONDS

log = logging.getLogger("tars.worker")

LAST_LINES = 40
"""Lines of a worker's output kept for the diagnosis of its end: a native abort with its stack takes about 25."""

LINE_MOST = 2_000
"""Bytes of one line that are kept."""

LINES_PER_SECOND = 50
"""Lines of one worker that reach the node's log, on average; a model's load prints about 100 once."""

LINES_BURST = 500
"""Lines that may come at once before the average counts."""

WRONG = re.compile(r"error|exception|failed|fatal|^Traceback ", re.IGNORECASE)
"""Lines of a worker that say why something went wrong: people see these, everything else is for a collector (`log_format = json`)."""

SPINS_OF_OTHERS = "10000"
"""How often an OpenMP thread looks before it sleeps, in an engine that does not choose (see `thread_waiting`): beside two busy programs
30,000 looks make a fifth of what these make."""

SECRET = re.compile(r"^TARS_|KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables that a worker never sees: it needs none of TARS's, and native code prints what it likes.
`TOKENIZERS_PARALLELISM` is set after this sieve."""


def child_environment(spec: LoadSpec, base: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment: `base` without secrets, then the device and thread limits of `spec`, then `extra`."""
    package_root = str(Path(__file__).resolve().parents[2])
    search = [package_root, *filter(None, [extra.get("PYTHONPATH"), base.get("PYTHONPATH")])]
    threads = str(max(1, spec.threads))
    return {
        **(thread_waiting.ENVIRONMENT if spec.engine == "llama" else {"GOMP_SPINCOUNT": SPINS_OF_OTHERS}),
        # glibc's arenas of threads are heaps of 64 MiB, in whose rests large activations do not fit.
        "MALLOC_ARENA_MAX": "1",
        **{name: value for name, value in base.items() if not SECRET.search(name)},
        **extra,
        "PYTHONPATH": os.pathsep.join(search),
        # An empty list hides every GPU: a CPU replica must not create a CUDA context (450 MiB on a 4090).
        "CUDA_VISIBLE_DEVICES": spec.cuda_device or "",
        # NVML counts in this order; CUDA's own default is fastest first.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # Models are files on this machine; a worker never asks a hub.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }


def end_of(returncode: int) -> str:
    """A process's end for people: `signal SIGSEGV`, `exit code 1`."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = str(-returncode)
    return f"signal {name}" + (": often the system ran out of memory" if name == "SIGKILL" else "")


class Child:
    """A started worker. `on_message` gets each message, `on_end` the end's cause, once, after the last message."""

    def __init__(
        self,
        spec: LoadSpec,
        engine: str,
        environment: Mapping[str, str],
        on_message: Callable[[dict[str, Any]], None],
        on_end: Callable[[str], None],
        abort_seconds: float = ABORT_SECONDS,
        nice: int = 0,
    ) -> None:
        self._abort_seconds = abort_seconds
        self._nice = nice
        self._spec = spec
        self._engine = engine
        self._environment = environment
        self._on_message = on_message
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._kill_wanted = False
        self._unsent: list[bytes] = []
        self._task = asyncio.create_task(self._live(), name=f"worker {spec.replica}")
        self._task.add_done_callback(self._ended)
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)

    @property
    def pid(self) -> int | None:
        """The process id, None before it was started."""
        return self._process.pid if self._process is not None else None

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message. Raises `TypeError` where JSON cannot carry it; a dead worker's messages vanish (its end is on its way)."""
        self.send_bytes(frame(message))

    def send_bytes(self, data: bytes) -> None:
        """Queue a framed message."""
        if self._process is None:
            self._unsent.append(data)
        elif self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(data)

    def kill(self) -> None:
        """SIGKILL, now or as soon as it was started."""
        self._kill_wanted = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait(self) -> None:
        """Until the process is gone and `on_end` was called."""
        await asyncio.wait([self._task])

    def _ended(self, task: asyncio.Task[str]) -> None:
        """Report the end, also where a fault of ours ended the task: a supervisor that never hears of it would wait for ever."""
        if task.cancelled():
            return  # the node's event loop is being closed
        fault = task.exception()
        if fault is not None:
            log.error("%s: a fault in watching the worker; it was ended", self._spec.replica, exc_info=fault)
        self._on_end("the node lost sight of it" if fault is not None else task.result())

    async def _live(self) -> str:
        """Start the process and watch it to its end; the end's cause."""
        command = [sys.executable, "-P", "-m", "tars.workers.process", "--engine", self._engine]
        command += ["--parent", str(os.getpid()), "--replica", self._spec.replica]
        command += ["--abort-seconds", str(self._abort_seconds), "--nice", str(self._nice)]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=READ_SIZE,
                env=dict(self._environment),
            )
        except OSError as error:
            log.error("%s: the worker process could not be started: %s", self._spec.replica, error)
            return "it could not be started"
        self._process = process
        if self._kill_wanted:
            self.kill()
        for data in self._unsent:
            self.send_bytes(data)
        self._unsent.clear()
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            asyncio.create_task(self._read_messages(process.stdout)),
            asyncio.create_task(self._read_lines(process.stderr)),
        ]
        try:
            returncode = await process.wait()
            # What the worker said before it died still counts. A grandchild may hold the pipes open: the wait is bounded.
            await asyncio.wait(readers, timeout=1.0)
        finally:
            for reader in readers:
                reader.cancel()
            self.kill()
        return end_of(returncode)

    async def _read_messages(self, stream: asyncio.StreamReader) -> None:
        reader = MessageReader(stream)
        try:
            while (messages := await reader.read()) is not None:
                for message in messages:
                    self._on_message(message)
        except FramingError as error:
            log.error("%s: the worker's stream is broken (%s); killing it", self._spec.replica, error)
            self.kill()
        except Exception:
            log.exception("%s: a message of the worker could not be handled; killing it", self._spec.replica)
            self.kill()

    async def _read_lines(self, stream: asyncio.StreamReader) -> None:
        """Native prints to the node's log: cut to `LINE_MOST` bytes, at most `LINES_PER_SECOND` on average."""
        rest, wrong = b"", False
        allowance, at, dropped = float(LINES_BURST), time.monotonic(), 0
        while data := await stream.read(READ_SIZE):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[:LINE_MOST]
            now = time.monotonic()
            allowance = min(LINES_BURST, allowance + (now - at) * LINES_PER_SECOND)
            at = now
            for line in lines:
                text = line[:LINE_MOST].decode("utf-8", "replace").rstrip()
                self.last_lines.append(text)
                if allowance < 1:
                    dropped += 1
                    continue
                allowance -= 1
                if dropped:
                    log.warning(
                        "%s: %d lines of the worker were dropped: it prints too much", self._spec.replica, dropped
                    )
                    dropped = 0
                # A traceback's lines are indented, up to the one that names the exception.
                wrong = bool(WRONG.search(text)) or (wrong and text.startswith(" "))
                log.log(logging.WARNING if wrong else logging.INFO, "%s: %s", self._spec.replica, text)
        if rest:
            self.last_lines.append(rest.decode("utf-8", "replace"))
