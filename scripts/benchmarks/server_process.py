"""A server as a child process in a group of its own: started on a free port, awaited until it answers, always ended.

Law of this file: it ends what it started, with everything that those processes started, and nothing else. `SIGTERM` becomes an exception
(`end_on_signals`), so that an interrupted benchmark ends its servers as a finished one does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_on_signals() -> None:
    """From now on SIGTERM and SIGHUP end this program as Ctrl-C does: through every `finally`."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers."""

    name: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(
    name: str,
    command: Callable[[int], Sequence[str]],
    *,
    ready: Callable[[str], bool],
    seconds: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start `command(port)` and wait until `ready(url)` is true, at most `seconds`; it may raise OSError while nobody listens.

    Raises SystemExit, with the end of what the server said, where it ends or does not get ready.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            list(command(port)),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ends_at = time.monotonic() + seconds
            while not _answers(ready, f"http://127.0.0.1:{port}"):
                if process.poll() is not None or time.monotonic() > ends_at:
                    said.seek(0)
                    how = "ended" if process.poll() is not None else f"was not ready after {seconds:g} s"
                    raise SystemExit(f"bench: {name} {how}. It said:\n{said.read()[-4000:]}")
                time.sleep(0.1)
            yield Server(name, port, process.pid)
        finally:
            end_group(process)


def _answers(ready: Callable[[str], bool], url: str) -> bool:
    try:
        return ready(url)
    except (OSError, ValueError):
        return False


def gets_200(path: str) -> Callable[[str], bool]:
    """A `ready` that asks for a page."""

    def ready(url: str) -> bool:
        with urllib.request.urlopen(url + path, timeout=5) as response:
            return bool(response.status == 200)

    return ready


def end_group(process: subprocess.Popen[bytes] | subprocess.Popen[str], patience_seconds: float = 15.0) -> None:
    """Ask it to end, then end it and every process of its session. A worker has a session of its own: it is found as a descendant."""
    descendants: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.wait()
