"""A worker: the child process that holds one replica. `python -m tars.workers.process --engine module:Class`.

Law of this file: JSON-RPC in, an engine out; no decision about restarts, no model knowledge. The event loop's thread owns the pipe; ONE
engine thread loads and runs the model (OpenMP keeps a pool per calling thread, and two pools on the same cores make every barrier a sleep).

What keeps it well-behaved:
- The pipe's descriptor is moved away from descriptor 1 before an engine is imported, and 1 points at 2: whatever native code prints
  lands in the node's log, never between two frames.
- It ends when its standard input ends. The node may die by SIGKILL: the kernel closes the pipe, and on Linux also sends SIGKILL
  (`PR_SET_PDEATHSIG`, which fires when the node's *thread* that started the worker ends: start workers from the thread that lives longest).
- Ctrl-C, SIGTERM to the process group and a closed terminal belong to the node, which drains first.
- The engine never waits for the pipe. A node that does not read (stopped, or busy) leaves bytes waiting here; over `OUTPUT_MOST` the calls
  that make more of them end with `Overloaded`, so that this process's memory is bounded.
- A step that stands still is broken off (`Engine.abort_step`, where the engine has it) before the node judges the whole process hung.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import pydantic

from tars.errors import CallerError, InvalidParams, Overloaded, TarsError, WorkerCrashed
from tars.messages.inference import Delta
from tars.messages.node import LoadedInfo, LoadProgress
from tars.workers import protocol
from tars.workers.engine import Engine, Event, Finished, LoadSpec, Resume, Submission
from tars.workers.niceness import stand_behind
from tars.workers.stdio import READ_SIZE, FramingError, MessageReader, frame
from tars.workers.wakeup import Wakeup
from tars.workers.watchdog import ABORT_SECONDS, StepWatchdog

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

ENGINE_STACK_BYTES = 256 * 2**20
"""Of the engine thread. llama.cpp's pre-tokenizers use `std::regex`, which recurses once per character; only touched pages cost memory."""

UNLOAD_SECONDS = 1.0
"""How long a shutdown waits for the engine to free its memory before the process's end does it."""

OUTPUT_MOST = 32 * 2**20
"""Bytes that may wait for a node that does not read: about 800,000 tokens. Whole answers always wait: they are as many as the calls."""

EXIT_ENGINE_FAILED = 70
"""EX_SOFTWARE of sysexits.h: the engine thread met an exception that it must not survive."""


def take_over_stdio() -> int:
    """Move the protocol's output away from descriptor 1 and point 1 at 2; the private descriptor. Before any engine is imported."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    return private


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL at the parent's death; end now where it is dead already."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(0)


def leave_signals_to_the_node() -> None:
    """See the module's law."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def create_engine(name: str) -> Engine:
    """An instance of `module:Class`; the import brings no engine package in yet (that is `load`'s stage `import`)."""
    module, _, attribute = name.partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)()
    return engine


class Output(asyncio.BaseProtocol):
    """The pipe to the node, which ends this process when it breaks."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The node is gone."""
        os._exit(0)


class Worker:
    """Both ends of one worker's pipe, and its engine."""

    def __init__(
        self, engine: Engine, output: asyncio.WriteTransport, abort_seconds: float = ABORT_SECONDS, nice: int = 0
    ) -> None:
        self._engine = engine
        self._nice = nice
        self._output = output
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[dict[str, Any] | Sequence[tuple[int, Event | Exception]]] = deque()
        self._wake = Wakeup(self._loop, self._flush)
        self._watchdog = StepWatchdog(abort_seconds)
        self._in_flight: set[int] = set()
        self._thread: threading.Thread | None = None
        self._loaded = False

    # --- the engine thread's side ---

    def _post(self, item: dict[str, Any] | Sequence[tuple[int, Event | Exception]]) -> None:
        """Hand something to the event loop; wakes it once however much is posted before it looks."""
        self._outbox.append(item)
        self._wake()

    def _emit(self, events: Sequence[tuple[int, Event | Exception]]) -> None:
        self._post(tuple(events))  # a copy: the engine may use its list again

    def _progress(self, stage: str, percent: float) -> None:
        progress = LoadProgress(stage=stage, percent=min(100.0, max(0.0, float(percent))))
        self._post(protocol.notification(protocol.PROGRESS, progress.model_dump()))

    def _engine_main(self, number: int, spec: LoadSpec) -> None:
        try:
            info = self._engine.load(spec, self._progress, self._emit)
        except TarsError as error:
            self._post(protocol.failure(number, error))
            return
        except Exception:  # noqa: BLE001  # whatever a native loader throws becomes one retryable error; the log has its text
            traceback.print_exc()
            text = "The model could not be loaded; the worker's lines in the node's log say why."
            self._post(protocol.failure(number, WorkerCrashed(text)))
            return
        self._loop.call_soon_threadsafe(self._load_done, number, info)
        try:
            self._engine.run()
        except BaseException:  # noqa: BLE001  # an engine thread that died must take its process along, or calls hang for ever
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(EXIT_ENGINE_FAILED)

    # --- the event loop's side ---

    def _load_done(self, number: int, info: LoadedInfo) -> None:
        self._loaded = True
        # From now on, and not while it loaded: what is missing is to be there soon, all the more where others have too much to do.
        stand_behind(self._nice)
        self._write([protocol.result(number, info)])

    def _flush(self) -> None:
        """One write of what the engine emitted: all deltas, then the ends, behind which no call has deltas any more."""
        rows: list[protocol.Row] = []
        messages: list[dict[str, Any]] = []
        ended: set[int] = set()
        in_flight = self._in_flight
        while self._outbox:
            item = self._outbox.popleft()
            if isinstance(item, dict):
                messages.append(item)
                continue
            for sequence, event in item:
                if sequence not in in_flight:
                    continue
                if isinstance(event, Delta):
                    rows.append(protocol.row_of(sequence, event))
                else:
                    in_flight.discard(sequence)
                    ended.add(sequence)
                    messages.append(_answer(sequence, event))
        if rows:
            if self._output.get_write_buffer_size() > OUTPUT_MOST:
                # What ended just now keeps its last rows: a stream has no gap, and nothing follows them.
                messages += self._break_off({row[0] for row in rows} & in_flight)
                rows = [row for row in rows if row[0] in ended]
            messages.insert(0, protocol.notification(protocol.STEP, rows))
        if messages:
            self._write(messages)

    def _break_off(self, sequences: set[int]) -> list[dict[str, Any]]:
        """End calls whose deltas have no room any more; see the module's law."""
        error = Overloaded("The node read this answer too slowly, and it was stopped. Send the call again in a moment.")
        for sequence in sequences:
            self._engine.cancel(sequence)
        self._in_flight -= sequences
        return [protocol.failure(sequence, error) for sequence in sorted(sequences)]

    def _write(self, messages: list[dict[str, Any]]) -> None:
        self._output.write(b"".join(map(frame, messages)))

    def _receive(self, message: dict[str, Any]) -> None:
        number, method, params = message.get("id"), message.get("method"), message.get("params", {})
        if method == protocol.CANCEL:
            self._engine.cancel(params["id"])
        elif method == protocol.SHUTDOWN:
            self._shut_down()
        elif not isinstance(number, int):
            print(f"worker: a message without an id and of no known kind: {method!r:.80}", file=sys.stderr)
        elif method == protocol.PING:
            self._write([protocol.result(number, self._pong())])
        elif method == protocol.LOAD and self._thread is None:
            self._start_engine(number, LoadSpec.model_validate(params))
        elif method in protocol.WORK_OF and self._loaded:
            self._submit(number, str(method), params)
        else:
            self._write([protocol.failure(number, CallerError("The worker does not take this message now."))])

    def _pong(self) -> protocol.Pong:
        return protocol.Pong(
            mark=self._engine.progress_mark(),
            in_flight=len(self._in_flight),
            memory_bytes=self._engine.memory_bytes() if self._loaded else 0,
            counters=self._engine.counters() if self._loaded else None,
        )

    async def _watch_steps(self) -> None:
        """Break off a step that stands still. Whether to try it again or to give its calls up is the engine's business."""
        while True:
            await asyncio.sleep(self._watchdog.interval)
            if self._watchdog.is_stuck(self._engine.progress_mark(), bool(self._in_flight), time.monotonic()):
                print("worker: a step of the engine stands still", file=sys.stderr)
                abort_step = getattr(self._engine, "abort_step", None)
                if abort_step is not None:
                    abort_step()

    def _start_engine(self, number: int, spec: LoadSpec) -> None:
        # A system that refuses so large a stack (ulimit -v) still gets a thread with its default one.
        for stack in (ENGINE_STACK_BYTES, 0):
            threading.stack_size(stack)
            self._thread = threading.Thread(target=self._engine_main, args=(number, spec), name="engine", daemon=True)
            try:
                self._thread.start()
                break
            except RuntimeError:
                if not stack:
                    raise
        threading.stack_size(0)

    def _submit(self, number: int, method: str, params: dict[str, Any]) -> None:
        try:
            work = protocol.WORK_OF[method].model_validate(params["work"])
            resume = Resume.model_validate(params["resume"]) if params.get("resume") is not None else None
        except pydantic.ValidationError:
            self._write([protocol.failure(number, InvalidParams("The worker refused the call's params."))])
            return
        timeout_ms = params.get("timeout_ms")
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        self._in_flight.add(number)
        self._engine.submit(Submission(number, work, deadline, resume))

    def _shut_down(self) -> NoReturn:
        if self._thread is not None and self._loaded:
            self._engine.unload()
            self._thread.join(UNLOAD_SECONDS)
        os._exit(0)

    async def serve(self, reader: MessageReader) -> None:
        """Handle messages until the pipe ends."""
        watching = asyncio.create_task(self._watch_steps())
        try:
            while (messages := await reader.read()) is not None:
                for message in messages:
                    self._receive(message)
        finally:
            watching.cancel()


def _answer(sequence: int, event: Finished | Exception) -> dict[str, Any]:
    """What ends a call."""
    if not isinstance(event, Exception):
        return protocol.result(sequence, event)
    if not isinstance(event, TarsError):
        traceback.print_exception(event)
    return protocol.failure(sequence, event)


async def _serve(engine_name: str, output: int, abort_seconds: float, nice: int) -> None:
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader(limit=READ_SIZE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), sys.stdin)
    transport, _ = await loop.connect_write_pipe(Output, os.fdopen(output, "wb", buffering=0))
    await Worker(create_engine(engine_name), transport, abort_seconds, nice).serve(MessageReader(stream))


def main() -> NoReturn:
    """The child's entry point."""
    output = take_over_stdio()
    parser = argparse.ArgumentParser(prog="tars-worker", description="A TARS worker; started by tars-node.")
    parser.add_argument("--engine", required=True, help="module:Class")
    parser.add_argument("--parent", type=int, default=0, help="process id of the node")
    parser.add_argument("--replica", default="", help="shown by ps; means nothing to the worker")
    parser.add_argument(
        "--abort-seconds", type=float, default=ABORT_SECONDS, help="a step without progress is broken off"
    )
    parser.add_argument(
        "--nice", type=int, default=0, help="how far it stands behind the node for the processor once it serves"
    )
    arguments = parser.parse_args()
    leave_signals_to_the_node()
    die_with_parent(arguments.parent)
    faulthandler.enable(file=sys.stderr)
    code = 0
    try:
        asyncio.run(_serve(arguments.engine, output, arguments.abort_seconds, arguments.nice))
    except FramingError as error:
        print(f"worker: {error}", file=sys.stderr)
        code = EXIT_ENGINE_FAILED
    except BaseException:  # noqa: BLE001  # the last lines in the node's log are all that is left of this process
        traceback.print_exc()
        code = EXIT_ENGINE_FAILED
    sys.stderr.flush()
    # Not sys.exit: native thread pools and callbacks into Python must not run during the interpreter's teardown.
    os._exit(code)


if __name__ == "__main__":
    main()
