"""A real `tars-node` process for end-to-end tests: started on a free port, always ended, always checked for what it leaves behind."""

import asyncio
import os
import re
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress

import psutil


class RunningNode:
    """`url` is known once the port is open; `output` is everything printed so far."""

    def __init__(self, process, state_dir):
        self.process = process
        self.state_dir = state_dir
        self.output = ""
        self.url = ""
        self._reader = asyncio.create_task(self._read())
        self._grew = asyncio.Event()

    async def _read(self):
        while line := await self.process.stdout.readline():
            self.output += line.decode()
            self._grew.set()
        self._grew.set()

    async def printed(self, pattern, seconds):
        """Wait until the output matches; the match. Fails with the whole output."""
        ends = time.monotonic() + seconds
        while True:
            self._grew.clear()
            if found := re.search(pattern, self.output):
                return found
            if self._reader.done() or time.monotonic() > ends:
                raise AssertionError(f"never printed {pattern!r}:\n{self.output}")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._grew.wait(), max(0.01, ends - time.monotonic()))

    async def ready(self, seconds=120):
        await self.printed(r"models? ready after", seconds)

    def workers(self):
        """The worker processes now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes(self):
        """Its own and its workers'."""
        return [psutil.Process(self.process.pid), *self.workers()]

    def send(self, number):
        self.process.send_signal(number)

    async def ended(self, seconds=20):
        """Wait for the end; the exit status."""
        status = await asyncio.wait_for(self.process.wait(), seconds)
        await self._reader
        return status


def node_command(*arguments):
    return [sys.executable, "-m", "tars.node", *map(str, arguments)]


def send_all(processes, number):
    """A signal to each that is still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@asynccontextmanager
async def frozen(processes):
    """They stand still meanwhile."""
    try:
        send_all(processes, signal.SIGSTOP)
        yield
    finally:
        send_all(processes, signal.SIGCONT)


@asynccontextmanager
async def running_node(state_dir, *arguments, environment=None):
    """Start a node on a free port; at the end it is stopped by SIGTERM and must leave no process and no partial file."""
    process = await asyncio.create_subprocess_exec(
        *node_command("--listen", "127.0.0.1:0", "--state-dir", state_dir, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
    )
    node = RunningNode(process, state_dir)
    workers = []
    try:
        node.url = (await node.printed(r"http://[\d.:]+", 60)).group(0)
        yield node
    finally:
        if process.returncode is None:
            workers = node.workers()
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 30)
            except TimeoutError:
                process.kill()
                await process.wait()
                raise AssertionError(f"the node did not end within its grace time:\n{node.output}") from None
        await node._reader
        _, alive = psutil.wait_procs(workers, timeout=5)
        for orphan in alive:
            orphan.kill()
        assert not alive, f"workers outlived their node: {alive}"
        if process.returncode != -signal.SIGKILL:  # killed in the middle of a write, only the next start can tidy up
            assert not list(state_dir.rglob("*.partial"))
