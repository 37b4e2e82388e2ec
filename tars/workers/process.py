"""A worker: the child process that holds one replica. `python -m tars.workers.process --engine module:Class`.

Law of this file: JSON-RPC in, an engine out; no decision about restarts, no model knowledge. The event loop's thread owns the pipe; ONE
engine thread loads and runs the model (OpenMP keeps a pool per calling thread, and two pools on the same cores make every barrier a sleep).

What keeps it well-behaved:
- The pipe's descriptor is moved away from descriptor 1 before an engine is imported, and 1 points at 2: whatever native code prints
  lands in the node's log, never between two frames.
- It ends when its standard input ends. The node may die by SIGKILL: the kernel closes the pipe, and on Linux also sends SIGKILL
  (`PR_SET_PDEATHSIG`, which fires when the node's *thread* that started the worker ends: start workers from the thread that lives longest).
- Ctrl-C, SIGTERM to the process group and a closed terminal belong to the node, which drains first.
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

from tars.errors import CallerError, InvalidParams, TarsError, WorkerCrashed
from tars.messages.inference import Delta
from tars.messages.node import LoadedInfo, LoadProgress
from tars.workers import protocol
from tars.workers.engine import Engine, Event, LoadSpec, Submission
from tars.workers.stdio import READ_SIZE, BlockingWriter, FramingError, MessageReader, frame

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

ENGINE_STACK_BYTES = 256 * 2**20
"""Of the engine thread. llama.cpp's pre-tokenizers use `std::regex`, which recurses once per character; only touched pages cost memory."""

UNLOAD_SECONDS = 1.0
"""How long a shutdown waits for the engine to free its memory before the process's end does it."""

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


class Worker:
    """Both ends of one worker's pipe, and its engine."""

    def __init__(self, engine: Engine, output: int) -> None:
        self._engine = engine
        self._writer = BlockingWriter(output)
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[dict[str, Any] | tuple[int, Event | Exception]] = deque()
        self._wake_lock = threading.Lock()
        self._awake = False
        self._in_flight: set[int] = set()
        self._thread: threading.Thread | None = None
        self._loaded = False

    # --- the engine thread's side ---

    def _post(self, item: dict[str, Any] | tuple[int, Event | Exception]) -> None:
        """Hand something to the event loop; wakes it once however much is posted before it looks."""
        self._outbox.append(item)
        with self._wake_lock:
            if self._awake:
                return
            self._awake = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(self._flush)

    def _emit(self, events: Sequence[tuple[int, Event | Exception]]) -> None:
        for one in events:
            self._post(one)

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
        self._write([protocol.result(number, info)])

    def _flush(self) -> None:
        with self._wake_lock:
            self._awake = False
        messages = []
        while self._outbox:
            item = self._outbox.popleft()
            if isinstance(item, dict):
                messages.append(item)
                continue
            sequence, event = item
            if sequence not in self._in_flight:
                continue
            if isinstance(event, Delta):
                messages.append(protocol.notification(protocol.DELTA, {"id": sequence, "delta": event.model_dump()}))
                continue
            self._in_flight.discard(sequence)
            if isinstance(event, Exception):
                if not isinstance(event, TarsError):
                    traceback.print_exception(event)
                messages.append(protocol.failure(sequence, event))
            else:
                messages.append(protocol.result(sequence, event))
        if messages:
            self._write(messages)

    def _write(self, messages: list[dict[str, Any]]) -> None:
        try:
            self._writer.write(b"".join(map(frame, messages)))
        except OSError:
            os._exit(0)  # the node is gone

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
        )

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
        except pydantic.ValidationError:
            self._write([protocol.failure(number, InvalidParams("The worker refused the call's params."))])
            return
        timeout_ms = params.get("timeout_ms")
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        self._in_flight.add(number)
        self._engine.submit(Submission(number, work, deadline))

    def _shut_down(self) -> NoReturn:
        if self._thread is not None and self._loaded:
            self._engine.unload()
            self._thread.join(UNLOAD_SECONDS)
        os._exit(0)

    async def serve(self, reader: MessageReader) -> None:
        """Handle messages until the pipe ends."""
        while (messages := await reader.read()) is not None:
            for message in messages:
                self._receive(message)


async def _serve(engine_name: str, output: int) -> None:
    stream = asyncio.StreamReader(limit=READ_SIZE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), sys.stdin)
    await Worker(create_engine(engine_name), output).serve(MessageReader(stream))


def main() -> NoReturn:
    """The child's entry point."""
    output = take_over_stdio()
    parser = argparse.ArgumentParser(prog="tars-worker", description="A TARS worker; started by tars-node.")
    parser.add_argument("--engine", required=True, help="module:Class")
    parser.add_argument("--parent", type=int, default=0, help="process id of the node")
    parser.add_argument("--replica", default="", help="shown by ps; means nothing to the worker")
    arguments = parser.parse_args()
    leave_signals_to_the_node()
    die_with_parent(arguments.parent)
    faulthandler.enable(file=sys.stderr)
    code = 0
    try:
        asyncio.run(_serve(arguments.engine, output))
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
